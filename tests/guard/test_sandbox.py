"""Model-written code against its tests: honest code passes, nothing escapes, we survive."""

import os
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gemma_cot.grpo.reward import RewardError
from gemma_cot.guard import jail
from gemma_cot.guard.sandbox import Limits, check, code_of, code_reward, run_tests
from gemma_cot.guard.user import checked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox takes Linux")

SHORT = Limits(wall_seconds=1.5, cpu_seconds=1, memory_mib=256, file_mib=1)
WALLS = [(), ("namespaces",), ("seccomp",)]  # left out, as on a machine that lacks them


def reward(codes: list[str], tests: list[str], limits: Limits = SHORT) -> list[float | None]:
    completions = [f"<reasoning>So:</reasoning><answer>{code}</answer>" for code in codes]
    metadata = [{"tests": tests}] * len(codes)
    return code_reward(["p"] * len(codes), completions, metadata=metadata,
                       allow_code_execution=True, limits=limits)  # fmt: skip


# ---- honest code --------------------------------------------------------------------------------

HONEST = '''
import collections, math
from dataclasses import dataclass

LIMIT = 7

@dataclass
class Pair:
    a: int
    b: int

def total(pairs, n=2):
    return sum(pair.a * pair.b for pair in pairs[:n])

def add(a, b=1):
    return a + b

def apply(f, x):
    return f(x)

def many():
    return {"a": [1, (2, 3)], "b": {4}, 5: None, "c": 1.5, "d": b"x", "e": 1j, "f": True,
            "g": 10**5000, "h": math.inf, "i": frozenset({"j"})}

def counts(text):
    return collections.Counter(text)

def first(n):
    yield from range(n)

def keep(values, kind):
    return [value for value in values if type(value) is kind]
'''
MANY = ("{'a': [1, (2, 3)], 'b': {4}, 5: None, 'c': 1.5, 'd': b'x', 'e': 1j, 'f': True, "
        "'g': 10**5000, 'h': float('inf'), 'i': frozenset({'j'})}")  # fmt: skip


@pytest.mark.parametrize(("test", "passes"), [
    ("assert add(1) == 2 and add(1, b=5) == 6", True),
    ("assert total([Pair(5, 24), Pair(1, 2)]) == 122", True),  # its objects may be handed back
    ("assert apply(add, 8) == 9", True),
    (f"assert many() == {MANY}", True),
    ("assert many()['f'] is True and type(many()['a'][1]) is tuple", True),
    ("assert counts('aab') == {'a': 2, 'b': 1}", True),
    ("assert list(first(3)) == [0, 1, 2]", True),
    ("assert keep([1, 2.5, 'a'], float) == [2.5]", True),
    ("assert LIMIT == 7", True),
    ("import math\nassert math.isclose(add(0.1, 0.2), 0.3)", True),
    ("assert [add(i) for i in range(3)] == [1, 2, 3]", True),
    ("x = add(1)\nassert x == 2", True),
    ("assert add(1) == 3", False),
    ("assert first(3) == [0, 1, 2]", False),  # a generator is no list
    ("assert missing(1) == 2", False),
    ("assert add('x') == 'x1'", False),  # it raises
    ("assert apply(lambda x: x, 4) == 4", False),  # only plain values reach the solution
    ("assert add(", False),
    ("raise SystemExit(0)", False),
])  # fmt: skip
def test_a_test_sees_what_the_functions_return(test, passes):
    outcome = run_tests(HONEST, [test])
    assert (outcome["passed"] == 1) is passes, outcome["why"]


@pytest.mark.parametrize("without", WALLS)
def test_every_test_must_pass(without):
    tests = ["assert add(1) == 2", "assert add(2) == 3", "assert add(3) == 5"]
    outcome = run_tests("def add(a): return a + 1", tests, without=without)
    assert outcome["passed"] == 2 and outcome["why"].startswith("AssertionError")
    assert set(outcome["missing"]) == set(without)


def test_why_a_solution_failed_is_told():
    assert "ZeroDivisionError" in run_tests("def f(): return 1 / 0", ["assert f() == 1"])["why"]
    assert "SyntaxError" in run_tests("def f(", ["assert f() == 1"])["why"]


def test_a_function_may_bear_a_builtins_name_but_never_takes_one_from_the_tests():
    assert run_tests("def sum(a, b): return a - b", ["assert sum(5, 3) == 2"])["passed"] == 1
    cheat = "def f(x): return 0\ndef all(x): return True\ndef isinstance(x, y): return True"
    assert run_tests(cheat, ["assert all([f(1) == 1])"])["passed"] == 0
    assert run_tests(cheat, ["assert isinstance(f(1), str)"])["passed"] == 0


# ---- attacks ------------------------------------------------------------------------------------

WON = ["assert f() == 'won'"]
RESOURCES = {
    "program": "import os\ndef f():\n    os.execv('/bin/true', ['true'])",
    "subprocess": "import subprocess\ndef f():\n    subprocess.run(['true'])\n    return 'won'",
    "endless loop": "def f():\n    while True: pass",
    "endless loop at import": "while True: pass",
    "sleep": "import time\ndef f():\n    time.sleep(100)\n    return 'won'",
    "deaf to the clock": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
                         "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "power tower": "def f(): return 10**10**9",
    "huge allocation": "def f():\n    x = [0] * 10**10\n    return 'won'",
    "400 MiB": "def f():\n    x = bytearray(400 << 20)\n    return 'won'",
    "slow allocation": "def f():\n    x = []\n    while True: x.append(bytearray(10**7))",
    "more memory by asking": "import resource\ndef f():\n"
                             "    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
                             "    return 'won'",
    "huge file": "def f():\n    h = open('x', 'wb')\n    h.write(bytes(5 << 20))\n    h.flush()\n"
                 "    return 'won'",
    "full disk": "def f():\n    for i in range(40): open(str(i), 'wb').write(bytes(10**6))\n"
                 "    return 'won'",
    "flood of output": "def f():\n    while True: print('x' * 10**6)",
    "huge answer": "def f(): return 'x' * 10**7",
    "deep answer": "def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "endless iterator": "import itertools\ndef f(): return itertools.count()",
    "recursion": "def f(): return f()",
    "crash": "import ctypes\ndef f(): ctypes.string_at(0)",
}  # fmt: skip
REACH = {  # files, network, other processes
    "fork bomb": "import os\ndef f():\n    while True: os.fork()",
    "fork": "import os\ndef f():\n    os.fork()\n    return 'won'",
    "file in /tmp": "def f():\n    open('{folder}/escaped', 'w').write('x')\n    return 'won'",
    "file in shared memory": "def f():\n    open('/dev/shm/escaped-{parent}', 'w')\n"
                             "    return 'won'",
    "changed file": "def f():\n    open('{folder}/victim', 'a').write('x')\n    return 'won'",
    "deleted file": "import os\ndef f():\n    os.unlink('{folder}/victim')\n    return 'won'",
    "link": "import os\ndef f():\n    os.symlink('{folder}/victim', 'l')\n"
            "    open('l', 'a').write('x')\n    return 'won'",
    "device": "import os, stat\ndef f():\n"
              "    os.mknod('d', stat.S_IFBLK | 0o666, os.makedev(8, 0))\n    return 'won'",
    "socket": "import socket\ndef f():\n"
              "    socket.create_connection(('127.0.0.1', {port}), 1)\n    return 'won'",
    "signal to the parent": "import os\ndef f():\n    os.kill({parent}, 9)\n    return 'won'",
    "signal to all": "import os\ndef f():\n    os.kill(-1, 9)\n    return 'won'",
    "signal to the group": "import os\ndef f():\n    os.killpg(0, 9)\n    return 'won'",
    "environment": "import os\ndef f(): return 'won' if 'REWARD_SECRET' in os.environ else ''",
    "parent's environment": "def f(): return 'won' * (b'REWARD_SECRET' in "
                            "open('/proc/{parent}/environ', 'rb').read())",
    "parent's memory": "def f():\n    open('/proc/{parent}/mem', 'rb').read(1)\n    return 'won'",
    "tester's files": "import os\ndef f():\n    os.readlink(f'/proc/{{os.getppid()}}/fd/0')\n"
                      "    return 'won'",
    "capability": "import os\ndef f():\n    os.chroot('/')\n    return 'won'",
    "root again": "import os\ndef f():\n    os.setuid(0)\n    return 'won'",
    "new namespace": "import ctypes\ndef f():\n"
                     "    return 'won' if ctypes.CDLL(None).unshare(0x10000000) == 0 else ''",
    "debugger": "import ctypes\ndef f():\n"
                "    return 'won' if ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0 else ''",
}  # fmt: skip
CHEATS = {
    "equals anything": "class A:\n    def __eq__(self, other): return True\ndef f(): return A()",
    "text that equals": "class A(str):\n    def __eq__(self, other): return True\n"
                        "    __hash__ = str.__hash__\ndef f(): return A('x')",
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\ndef f(): os._exit(0)",
    "forged verdict": "import os\nfor fd in range(256):\n    try: os.write(fd, b'{{\"passed\": 1, "
                      "\"why\": \"\", \"missing\": {{}}}}')\n    except OSError: pass\nos._exit(0)",
    "patched builtins": "import builtins\nbuiltins.AssertionError = KeyboardInterrupt\n"
                        "builtins.exec = builtins.compile = print\ndef f(): return ''",
    "no code": "", "no Python": "Just return 'won'.", "NUL": "def f(): return 'won'\x00",
}  # fmt: skip


@pytest.fixture
def prey(tmp_path, monkeypatch):
    """What an attack may try to reach: a file, a listening socket, a secret, this process."""
    monkeypatch.setenv("REWARD_SECRET", "hunter2")
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o711)
    (tmp_path / "victim").write_text("whole")
    (tmp_path / "victim").chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"folder": tmp_path, "port": server.getsockname()[1], "parent": os.getpid()}
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert (tmp_path / "victim").read_text() == "whole"
    assert not Path(f"/dev/shm/escaped-{os.getpid()}").exists()


def running() -> list[str]:
    """Return the process numbers of every jail on this machine that this test process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"jail.py" in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.parametrize("without", WALLS, ids=["all walls", "no namespaces", "no seccomp"])
def test_no_attack_wins_and_the_parent_survives(prey, without):
    attacks = REACH | ({} if without else RESOURCES | CHEATS)
    limits = Limits(wall_seconds=1.0, cpu_seconds=1, memory_mib=256, file_mib=1)

    def won(name: str) -> bool:
        return run_tests(attacks[name].format(**prey), WON, limits, without)["passed"] > 0

    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip(attacks, pool.map(won, attacks), strict=True))
    assert [name for name, is_won in outcomes.items() if is_won] == []
    until = time.monotonic() + 10
    while running() and time.monotonic() < until:
        time.sleep(0.02)
    assert running() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="the test above runs as such a user already")
def test_a_user_who_is_not_root_is_shut_in_as_well(prey):
    """The same attacks as user 1000, which takes another way in: a user namespace."""
    attacks = {name: code.format(**prey) for name, code in REACH.items()}
    script = f"""
from gemma_cot.guard.sandbox import Limits, run_tests
for without in {WALLS}:
    honest = run_tests("def f(): return 'won'", {WON}, Limits(), without)
    assert honest["passed"] == 1 and set(honest["missing"]) >= set(without), honest
    for name, code in {attacks}.items():
        harmless = "seccomp" in without and name.startswith(("fork", "signal", "new name"))
        if run_tests(code, {WON}, Limits(1.0, 1, 256, 1), without)["passed"] and not harmless:
            print(without, name)
"""
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c",
               script]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.stderr.startswith("unshare: "):
        pytest.skip("no user namespaces here")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_row_that_attacks_scores_zero_beside_rows_that_do_not(prey):
    codes = ["def f(): return 'won'", REACH["fork bomb"], RESOURCES["sleep"],
             REACH["signal to the parent"].format(**prey), CHEATS["exit"],
             "def f(): return 'won'"]  # fmt: skip
    assert reward(codes, WON) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_honest_code_has_a_folder_of_its_own_where_there_are_namespaces():
    code = "def f():\n    open('x', 'w').write('won')\n    return open('x').read()"
    outcome = run_tests(code, WON)
    assert outcome["passed"] == (0 if "namespaces" in outcome["missing"] else 1)
    assert run_tests(code, WON, without=("namespaces",))["passed"] == 0  # nothing is writable
    look = "import os\ndef f(): return 'won' if os.path.exists('/etc/passwd') else ''"
    assert run_tests(look, WON)["passed"] == (1 if "namespaces" in outcome["missing"] else 0)


def test_nothing_runs_without_a_wall_to_the_network():
    outcome = run_tests(HONEST, ["assert add(1) == 2"], without=("namespaces", "seccomp"))
    assert outcome["passed"] == 0 and outcome["why"] == "no wall to the network"


def test_the_check_tells_what_is_missing_here():
    outcome = run_tests("def f(): return 1", ["assert f() == 1"])
    assert len(check()) == len(outcome["missing"])


# ---- the reward function ------------------------------------------------------------------------


def test_code_runs_only_where_it_is_allowed():
    for completions in ([], ["<answer>def f(): pass</answer>"]):
        with pytest.raises(ValueError, match="only where it is allowed.*--allow_code_execution"):
            code_reward(["p"] * len(completions), completions, metadata=[{"tests": WON}])
    with pytest.raises(RewardError, match="code - must not raise - got ValueError: code_reward"):
        checked("code", code_reward)(["p"], ["c"], metadata=[{"tests": WON}])


@pytest.mark.parametrize("metadata", [
    None, [], [None], [{}], ["text"], [{"tests": []}], [{"tests": "assert f()"}],
    [{"tests": [1]}], [{"tests": None}],
])  # fmt: skip
def test_a_row_without_tests_does_not_apply(metadata):
    assert code_reward(["p"], ["<answer>x = 1</answer>"], metadata=metadata,
                       allow_code_execution=True) == [None]  # fmt: skip


def test_code_is_the_single_answer_block_out_of_its_fence():
    assert code_of("<reasoning>a</reasoning><answer>x = 1</answer>") == "x = 1"
    assert code_of("<answer>\n```python\nx = 1\ny = 2\n```\n</answer>") == "x = 1\ny = 2"
    assert code_of("<answer>```\nx = '```'\n```</answer>") == "x = '```'"
    for text in ("x = 1", "<answer>x = 1", "<answer>x</answer><answer>y</answer>", ""):
        assert code_of(text) is None
    assert code_reward(["p"], ["def f(): return 'won'"], metadata=[{"tests": WON}],
                       allow_code_execution=True) == [0.0]  # fmt: skip


# ---- the filter of system calls, run by hand ----------------------------------------------------


def decide(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """Return what the kernel would: run a BPF program on one system call."""
    data = struct.pack("iIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    lines = list(struct.iter_unpack("HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, k = lines[at]
        at += 1
        if code == 0x06:
            return k
        if code == 0x20:
            (accumulator,) = struct.unpack_from("I", data, k)
            continue
        holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
        at += if_true if holds else if_false


ALLOW, EPERM, KILL = 0x7FFF0000, 0x00050001, 0x80000000


@pytest.mark.parametrize(("machine", "arch", "calls"), [
    ("x86_64", 0xC000003E, {"read": 0, "write": 1, "mmap": 9, "exit_group": 231, "getpid": 39,
                            "socket": 41, "clone": 56, "kill": 62, "open": 2, "openat": 257}),
    ("aarch64", 0xC00000B7, {"read": 63, "write": 64, "mmap": 222, "exit_group": 94, "getpid": 172,
                             "socket": 198, "clone": 220, "kill": 129, "openat": 56}),
])  # fmt: skip
def test_the_filter_refuses_what_it_names_and_nothing_else(machine, arch, calls):
    for may_write in (True, False):
        program = jail.seccomp_filter(machine, may_write)
        for name in ("read", "write", "mmap", "exit_group", "getpid"):
            assert decide(program, arch, calls[name]) == ALLOW, name
        for name in ("socket", "clone", "kill"):
            assert decide(program, arch, calls[name]) == EPERM, name
        assert decide(program, arch ^ 1, calls["read"]) == KILL
        for name, flags in ((n, 1) for n in ("open", "openat") if n in calls):
            place = (0,) * (flags + (name == "openat"))
            assert decide(program, arch, calls[name], *place, os.O_RDONLY) == ALLOW
            for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
                wanted = ALLOW if may_write else EPERM
                assert decide(program, arch, calls[name], *place, flag) == wanted, (name, flag)
    assert decide(jail.seccomp_filter("x86_64", True), 0xC000003E, 0x40000000 + 41) == EPERM  # x32


def test_another_machine_has_no_filter():
    with pytest.raises(OSError, match="no table of system calls for riscv64"):
        jail.seccomp_filter("riscv64", may_write=True)
