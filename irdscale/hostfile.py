"""Run a verb with DeepSpeed on every host of a hostfile, over plain ssh: `python -m irdscale.hostfile FILE [VERB ...]`

Before any work each host is asked whether it answers, and has this Python with irdscale and DeepSpeed; without a verb
that is all. Then DeepSpeed's launcher runs on each, in the present folder, as it runs without ssh of its own. The ranks
meet at MASTER_ADDR and MASTER_PORT; the first host's address, and 29500, if unset. All ends as soon as a host fails, or
this process or its connection ends.

Exit codes: 0 done, 2 a host or a line of the file is no good, else that of the first host that failed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from irdscale.errors import InputError, RunError

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
# ssh's own exit code where it did not get as far as to run anything.
_NO_CONNECTION = 255
_POLL_S = 0.2
# How long the others may say what they know of the failed one, before they are ended.
_LAST_WORDS_S = 20.0
_CHECK_S = 60.0
# What of this environment holds on the hosts too; nothing secret, for anybody there can read a command.
_PASSED_ON = re.compile(r"(NCCL|GLOO|UCX)_\w+|OMP_NUM_THREADS|PYTHONPATH|HF_HUB_OFFLINE|HF_HOME")
# What is built when it is first used needs the tools beside Python. Nothing is ever sent to stdin: its end is that of
# the connection, over which no signal comes.
_UNTIL_DISCONNECTED = """
PATH="$1:$PATH"
shift
exec 3<&0
setsid "$@" </dev/null &
command=$!
{ read -r _ <&3; kill -TERM "-$command"; } &
watcher=$!
wait "$command"
code=$?
kill "$watcher" 2>/dev/null
exit "$code"
"""
_HAS_ALL = "import irdscale, sys; from importlib.util import find_spec; sys.exit(not find_spec('deepspeed'))"


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> its slots, in the order of the file. Blank lines and comments (#) are skipped.

    Raises:
        InputError: there is no such file, no host in it, a line of another form, or a host that is there twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the hostfile: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        # A name that begins with a dash would be an option of ssh.
        found = re.fullmatch(r"([\w.][\w.@-]*)\s+slots=([1-9]\d*)", text, re.ASCII)
        if found is None:
            raise InputError(f"{path}:{number}: found {text!r}; expected 'HOST slots=N', such as 'node1 slots=8'")
        host, slots = found[1], int(found[2])
        if host in hosts:
            raise InputError(f"{path}:{number}: {host}: given twice; expected one line a host")
        hosts[host] = slots
    if not hosts:
        raise InputError(f"{path}: found no hosts; expected lines such as 'node1 slots=8'")
    return hosts


def check_hosts(hosts: Sequence[str]) -> str:
    """Ask all hosts at once whether they can run irdscale with DeepSpeed; the first one's address.

    Raises:
        InputError: one cannot, or does not answer; names it, with what was found.
    """
    python = shlex.join([sys.executable, "-c", _HAS_ALL])
    # A host's own idea of its address, as DeepSpeed asks for it.
    test = f"cd {shlex.quote(os.getcwd())} && {python} && hostname -I"
    with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
        answers = list(pool.map(lambda host: _ask(host, test), hosts))
    problems = []
    for host, (code, said, complained) in zip(hosts, answers, strict=True):
        last = (complained.strip().splitlines() or [f"exit code {code}"])[-1]
        if code == _NO_CONNECTION:
            problems.append(f"{host}: cannot be reached: {last}; expected ssh to it without a password")
        elif code:
            problems.append(
                f"{host}: found no irdscale with deepspeed ({last}); "
                f"expected {os.getcwd()} and {sys.executable}, as here"
            )
        elif not said.split():
            problems.append(f"{host}: found no address (hostname -I); expected one that the others reach")
    if problems:
        others = ", ".join(problem.partition(":")[0] for problem in problems[1:])
        raise InputError(problems[0] + (f" (not well either: {others})" if others else ""))
    return answers[0][1].split()[0]


def _ask(host: str, command: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            [*SSH, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHECK_S
        )
    except subprocess.TimeoutExpired:
        return _NO_CONNECTION, "", f"no answer within {_CHECK_S:.0f} seconds"
    except OSError as error:
        return _NO_CONNECTION, "", f"{SSH[0]}: {error.strerror}"
    return done.returncode, done.stdout, done.stderr


def run_on(hosts: Sequence[str], commands: Sequence[Sequence[str]]) -> int:
    """Run each host's command, and end all when one fails; the exit code of the first that failed, or 0.

    Raises:
        RunError: a host's connection broke; names it.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        kept = [f"{name}={value}" for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)]
        tools = str(Path(sys.executable).parent)
        for host, command in zip(hosts, commands, strict=True):
            remote = ["env", *kept, "sh", "-c", _UNTIL_DISCONNECTED, "sh", tools, *command]
            text = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(remote)}"
            running[host] = subprocess.Popen([*SSH, host, text], stdin=subprocess.PIPE)
        failed: tuple[str, int] | None = None
        deadline = float("inf")
        while running and time.monotonic() < deadline:
            for host, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[host]
                if code and failed is None:
                    failed, deadline = (host, code), time.monotonic() + _LAST_WORDS_S
            time.sleep(_POLL_S)
    finally:
        # Closing stdin ends what runs at the other end.
        for process in running.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in running.values():
            try:
                process.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if failed is None:
        return 0
    host, code = failed
    if code == _NO_CONNECTION or code < 0:
        raise RunError(f"{host}: the connection broke; the same command goes on")
    print(f"irdscale.hostfile: {host}: failed with exit code {code}", file=sys.stderr, flush=True)
    return code


def _launcher(hostfile: Path, rank: int, address: str, arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher on one host."""
    place = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank), "--master_addr", address]
    port = ["--master_port", os.environ.get("MASTER_PORT", "29500")]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *place, *port, "--module", "irdscale", *arguments]


def main() -> None:
    """Run the command line of this process and exit with its code."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m irdscale.hostfile FILE [VERB CONFIG ...]")
    file, arguments, code = Path(sys.argv[1]).absolute(), sys.argv[2:], 0
    try:
        hosts = list(read_hostfile(file))
        address = check_hosts(hosts)
        if arguments:
            address = os.environ.get("MASTER_ADDR") or address
            code = run_on(hosts, [_launcher(file, rank, address, arguments) for rank in range(len(hosts))])
    except (InputError, RunError) as error:
        print(f"irdscale.hostfile: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("irdscale.hostfile: interrupted; the same command goes on", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
