"""The files that start searches on clusters: what they say, and searches that they run on hosts that are namespaces."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from irdscale.config.loader import load_config
from tests.hosts import ROOT, TWO_NODES, apart, make_checkout, script
from tests.search.toy import write_config

LAUNCH = ROOT / "launch"
FILES = [LAUNCH / name for name in ("ray_cluster.yaml", "kuberay_job.yaml", "slurm_search_ray.sbatch", "ray_job.sh")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_header_says_what_it_does_what_it_needs_and_the_command(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("#!", "#SBATCH"))]
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("# "))]
    assert re.match(r"# (A|Runs|Submits) ", header[0])
    assert any(line.startswith("#   ") and f"launch/{path.name}" in line for line in header), "no command"
    assert any(line.startswith("# Needs ") for line in header)
    assert max(map(len, path.read_text().splitlines())) <= 122


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_machine_paths(path):
    text = path.read_text().replace("#!/usr/bin/env bash", "").replace(">/dev/null", "")
    assert not re.search(r"(?<![\w.}\"~])/(home|root|work|opt|tmp|usr|mnt|data)\b", text)


def test_the_scripts_parse():
    for path in FILES[2:]:
        subprocess.run(["bash", "-n", str(path)], check=True)


# ray_cluster.yaml


def for_aws(text):
    """The configuration that the end of the file describes: its lines in place of those that they replace."""
    kept, aws = text.split("# For AWS, ")
    lines = aws.split("#\n", 1)[1].splitlines()
    other = yaml.safe_load("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    local = yaml.safe_load(kept)
    return {k: v for k, v in local.items() if k not in ("provider", "auth", "min_workers", "max_workers")} | other


@pytest.mark.parametrize("choose", [yaml.safe_load, for_aws], ids=["local", "aws"])
def test_ray_up_takes_the_cluster(choose):
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(choose((LAUNCH / "ray_cluster.yaml").read_text()))
    util.validate_config(config)
    workers = [kind["max_workers"] for kind in config["available_node_types"].values() if kind.get("min_workers")]
    assert workers
    assert all(count >= 1 for count in workers)


def test_the_cluster_gets_the_checkout_without_what_is_made_here():
    config = yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())
    (checkout,) = [remote for remote, local in config["file_mounts"].items() if local == "."]
    assert {".venv", ".git", "/runs"} == set(config["rsync_exclude"])
    assert config["setup_commands"] == [f"bash {checkout}/launch/install.sh ray"]
    assert config["max_workers"] == config["min_workers"] == len(config["provider"]["worker_ips"])
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert f"PATH={checkout}/.venv/bin:$PATH" in command, "another Ray than the one that was installed"
        assert "RAY_AUTH_MODE=token" in command, "open to whoever reaches the port"
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "~/.ray/auth_token" in config["file_mounts"]


@pytest.mark.parametrize(
    ("kind", "commands"),
    [("--head", "head_start_ray_commands"), ("--address=127.0.0.1:6379", "worker_start_ray_commands")],
)
def test_ray_start_knows_the_options_of_the_cluster(kind, commands):
    click = pytest.importorskip("click")
    start = pytest.importorskip("ray.scripts.scripts").start
    command = yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())[commands][-1]
    arguments = shlex.split(command.replace("$RAY_HEAD_IP", "127.0.0.1").split("ray start ")[1])
    assert kind in arguments
    context = start.make_context("start", arguments)
    assert isinstance(context, click.Context)


# kuberay_job.yaml


def documents():
    return {document["kind"]: document for document in yaml.safe_load_all((LAUNCH / "kuberay_job.yaml").read_text())}


def test_the_ray_job_has_what_kuberay_requires():
    job = documents()["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    pins = (LAUNCH / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in pins
    assert f"rayproject/ray:{cluster['rayVersion']}-" in (LAUNCH / "kuberay_job.yaml").read_text()
    # Tokens came with 2.52; without, whoever reaches the head runs what he likes.
    assert cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    images = set()
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        images.add(container["image"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len(images) == 1, "nodes would have other versions"
    assert "nvidia.com/gpu" in container["resources"]["limits"]


def test_all_pods_share_the_volume_to_which_the_search_writes():
    found = documents()
    claim, cluster = found["PersistentVolumeClaim"], found["RayJob"]["spec"]["rayClusterSpec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (output,) = [word for word in found["RayJob"]["spec"]["entrypoint"].split() if word.startswith("output=")]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (volume,) = spec["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = spec["containers"][0]["volumeMounts"]
        assert mount["name"] == volume["name"]
        assert output.startswith(f"output={mount['mountPath']}/")


def test_irdscale_takes_the_entrypoint():
    program, verb, config, *overrides = shlex.split(documents()["RayJob"]["spec"]["entrypoint"])
    assert (program, verb) == ("irdscale", "search")
    # The image has the checkout as `code`.
    settings = load_config(ROOT / config.removeprefix("code/"), overrides)
    assert settings.search.runner == "ray"
    assert Path(settings.output).is_absolute()


# What runs here


@pytest.fixture
def checkout(tmp_path):
    """The code and the launchers, with Ray at hand and nothing to install, and a toy search beside it."""
    write_config(tmp_path, search__max_rounds=1, search__seeds=[0], train__steps=4)
    return make_checkout(tmp_path / "checkout", ray="ray.scripts.scripts")


def apart_with_ray(checkout, text, short, timeout=600, **variables):
    """Run a script as root of a host of its own, with a folder for Ray's sockets; `ray stop` ends nothing else."""
    pytest.importorskip("ray")
    return apart(checkout, text, timeout, RAY_TMPDIR=str(short), **variables)


@pytest.fixture
def short(tmp_path_factory):
    """A folder with a name so short that Ray's sockets fit in it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ird", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


SRUN = """
while [[ "$1" == --* ]]; do shift; done
for node in one two; do
  mkdir -p "$RAY_TMPDIR/$node"
  RAY_TMPDIR="$RAY_TMPDIR/$node" ip netns exec $node \
    unshare --uts --pid --fork --kill-child --mount-proc bash -c 'hostname "$0"; "$@"; exit $?' $node "$@" &
  nodes+=($!)
done
wait "${nodes[0]}"
"""


def slurm(checkout, short, *arguments):
    script(checkout / ".venv" / "bin" / "srun", SRUN)
    command = f"ip netns exec one bash launch/slurm_search_ray.sbatch {shlex.join(arguments)}"
    return apart_with_ray(
        checkout,
        TWO_NODES + command,
        short,
        timeout=1500,
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        # A trial of two ranks fits on no node alone.
        SLURM_CPUS_ON_NODE="1",
        SLURM_SUBMIT_DIR=str(checkout),
        # gloo would ask for the address of the host's name, which nobody knows here.
        GLOO_SOCKET_IFNAME="net0",
    )


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_slurm_runs_a_search_whose_trials_span_two_nodes(checkout, short):
    output = checkout.parent / "out"
    # No half is above the minima: the start and the baselines alone.
    fast = ["search.min_samples=16", "search.min_ratio=0.05"]
    done, said = slurm(checkout, short, "../toy.yaml", f"output={output}", "search.ray.ranks=2", *fast)
    assert done.returncode == 0, said
    assert (checkout / "installed").read_text() == "ray\n"
    assert json.loads((output / "result.json").read_text())["evaluations"] == 1
    assert not list(checkout.glob(".slurm-*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_exit_code_of_a_search_is_that_of_the_job(checkout, short):
    done, said = slurm(checkout, short, "no-such.yaml")
    assert done.returncode == 2, said
    assert "no-such.yaml" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_ray_does_not_start_fails(checkout, short):
    binaries = checkout / ".venv" / "bin"
    started = (binaries / "ray").read_text().splitlines()[1]
    script(binaries / "ray", f'if [[ "$1" == start ]]; then exit 1; fi\n{started}')
    done, said = slurm(checkout, short, "../toy.yaml", f"output={checkout.parent / 'out'}")
    assert done.returncode == 1, said
    assert "slurm_search_ray.sbatch: Ray did not start on 2 node(s)" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_job_runs_a_search_with_this_code(checkout, short):
    for module in ("aiohttp_cors", "opencensus", "grpc"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"ray[default], which serves submitted jobs, is not installed (no {module})")
    output = checkout.parent / "out"
    # The shipped code, not another that is installed, says so in the log.
    main = checkout / "irdscale" / "__main__.py"
    main.write_text('print("shipped code")\n' + main.read_text().replace("from __future__ import annotations\n", ""))
    (checkout / "runs").mkdir()
    (checkout / "runs" / "large").write_bytes(bytes(2**20))
    command = f"""
ray get-auth-token --generate >/dev/null
RAY_AUTH_MODE=token ray start --head --node-ip-address 127.0.0.1 --port 6379 --num-cpus 2 --disable-usage-stats
RAY_ADDRESS=http://127.0.0.1:8265 bash launch/ray_job.sh "{checkout.parent}/toy.yaml" output="{output}" search.seeds=[1]
find "{short}" -name large
"""
    done, said = apart_with_ray(checkout, command, short)
    assert done.returncode == 0, said
    assert "shipped code" in done.stdout + done.stderr
    assert json.loads((output / "result.json").read_text())["config"]["search"]["seeds"] == [1]
    assert not done.stdout.rstrip().endswith("large"), "what runs wrote was shipped"


def test_a_job_needs_an_output_that_outlives_it(checkout):
    for arguments in (["my.yaml"], ["my.yaml", "output=runs/one"], ["my.yaml", "search.output=/x"]):
        done = subprocess.run(["bash", "launch/ray_job.sh", *arguments], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"ray_job.sh: found '{' '.join(arguments)}'; expected CONFIG and output=DIR")
        assert done.stderr.count("\n") == 1
        assert not (checkout / "installed").exists()
