"""The inside of the sandbox: `python -I -S jail.py` runs model-written code against tests. Linux.

Started by guard/sandbox.py with a job on stdin; answers with one JSON line on stdout. Only the
standard library, as nothing else is there. Three processes: the outer one enters new namespaces
and waits; the tester (first process of its own world) runs the tests, which come from the dataset;
the solution, its child, runs the model's code and answers calls over a pipe with plain values.
So an object that equals anything, a `sys.exit(0)` or a patched builtin of the model's never meets
the tests, and no code of the model's sees the pipe that carries the verdict.

Two walls stand around both, each enough to keep them off the network: namespaces (no network, an
own process table, a file system of read-only libraries and one small folder in memory, nobody's
user id) and a seccomp filter (no sockets, no processes or programs, no signals, no mounts; and
where there are no namespaces, no file that can be written to). Resource limits stand inside.
"""

import ast
import builtins
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from contextlib import suppress

NOBODY = 65534
MAX_FRAME = 1 << 20  # bytes of a call or an answer between tester and solution
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> None:
    """Call a C function that returns -1 on failure. Raises OSError naming it."""
    longs = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    if getattr(_libc, name)(*longs) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


# ---- namespaces ---------------------------------------------------------------------------------

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 1, 2


def enter_namespaces() -> None:
    """Leave the world's network, processes, mounts and IPC; the next child is process 1 of its own.

    Root needs no user namespace; anyone else maps itself to nobody in a new one. Raises OSError.
    """
    kinds = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid:
            raise OSError("only root may do without a user namespace")
        _call("unshare", kinds)
    except OSError:
        _call("unshare", kinds | _NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"),
                           ("gid_map", f"{NOBODY} {gid} 1")):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def enter_own_root(root: str, libraries: list[str]) -> None:
    """Make `root` a small file system in memory with read-only `libraries`, and stay there.

    Its one writable folder becomes the working directory; no /proc, /dev, /home or /tmp is there.
    """
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=16m,mode=755")
    for path in libraries:
        inside = root + path
        if os.path.islink(path):  # /lib -> usr/lib
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.isdir(inside):
            os.makedirs(inside)
            _call("mount", path.encode(), inside.encode(), None, _MS_BIND | _MS_REC, None)
            attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
            _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, inside.encode(), _AT_RECURSIVE,
                  attributes, len(attributes))  # fmt: skip
    os.mkdir(root + "/work")
    os.chmod(root + "/work", 0o777)
    os.chroot(root)
    os.chdir("/work")


# ---- privileges and system calls ----------------------------------------------------------------

_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
_EPERM = 0x00050001  # SECCOMP_RET_ERRNO | EPERM

# Refused system calls: name -> number on x86-64 and on aarch64, None where there is none.
_NEVER = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "prlimit64": (302, 261), "setsid": (112, 157), "setpgid": (109, 154),
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "mount_setattr": (442, 442), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "personality": (135, 92), "reboot": (169, 142), "syslog": (103, 116), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "memfd_create": (319, 279), "mq_open": (240, 180),
}  # fmt: skip
_WRITES = {
    "creat": (85, None), "openat2": (437, 437), "truncate": (76, 45), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88),
    "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
}  # fmt: skip
_OPENS = {"open": ((2, None), 1), "openat": ((257, 56), 2)}  # and which argument holds the flags
_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH


def seccomp_filter(machine: str, may_write: bool) -> bytes:
    """Return the BPF program that refuses the calls above with EPERM. Raises OSError elsewhere.

    A jump goes over (jump if true, jump if false) instructions; offsets are of struct seccomp_data.
    """
    if machine not in _MACHINES:
        raise OSError(f"no table of system calls for {machine}")
    column, arch = _MACHINES[machine]
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, 0x80000000),  # another: killed
               (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, _EPERM)]  # x32
    refused = [numbers[column] for numbers in (_NEVER | ({} if may_write else _WRITES)).values()]
    for number in refused:
        if number is not None:
            program += [(equal, 0, 1, number), (answer, 0, 0, _EPERM)]
    for numbers, argument in () if may_write else _OPENS.values():
        if numbers[column] is not None:
            program += [(equal, 0, 4, numbers[column]), (load, 0, 0, 16 + 8 * argument),
                        (has_bits, 0, 1, _WRITE_FLAGS), (answer, 0, 0, _EPERM), (load, 0, 0, 0)]
    program.append((answer, 0, 0, 0x7FFF0000))  # everything else is allowed
    return b"".join(struct.pack("HBBI", *line) for line in program)


def filter_system_calls(program: bytes) -> None:
    """Install a BPF program in this process for good. Raises OSError."""
    code = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    _call("prctl", _SECCOMP, 2, ctypes.create_string_buffer(head), 0, 0)


def drop_privileges() -> None:
    """Become nobody if this is root, and keep no capability and no way to win one back."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _call("prctl", _DUMPABLE, 0, 0, 0, 0)  # nobody else of this user may look into its memory


def limit_resources(limits: dict) -> None:
    """Set the limits of this process; the wall clock is the caller's business."""
    memory, size = limits["memory_mib"] << 20, limits["file_mib"] << 20
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, limits["cpu_seconds"]),
                       (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_NOFILE, 64),
                       (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 1)):  # fmt: skip
        resource.setrlimit(kind, (most, most))


# ---- plain values between tester and solution ---------------------------------------------------


class Name:
    """A function of the solution, as the tests hold it."""

    def __init__(self, name, ask):
        self.name, self.ask = name, ask

    def __call__(self, *args, **kwargs):
        return self.ask(self.name, pack([args, kwargs], None))


class Thing:
    """An object of the solution's that is no plain value: it may be handed back, nothing else."""

    def __init__(self, number):
        self.number = number


_TYPES = {t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, set, dict)}


def pack(value, things: list | None):
    """Return a plain value as JSON with its type; anything else is kept in `things` by number.

    Raises TypeError for such an object where `things` is None.
    """
    for kind, tag in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            return [tag, [pack(item, things) for item in kind(value)]]
    if isinstance(value, dict):
        return ["dict", [[pack(k, things), pack(v, things)] for k, v in dict(value).items()]]
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real.hex(), value.imag.hex()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, Name | Thing):
        return ["name", value.name] if isinstance(value, Name) else ["thing", value.number]
    if any(value is kind for kind in _TYPES.values()):
        return ["type", value.__name__]
    if hasattr(value, "__next__"):
        return ["iterator", [pack(item, things) for item in value]]
    if things is None:
        raise TypeError(f"only plain values reach the solution, not {type(value).__name__}")
    things.append(value)
    return ["thing", len(things) - 1]


def unpack(value, names, things):
    """Return what `pack` packed; `names` and `things` look up the solution's own objects."""
    if not isinstance(value, list):
        return value
    tag, inner = value
    if tag == "dict":
        return {unpack(k, names, things): unpack(v, names, things) for k, v in inner}
    if tag in ("list", "tuple", "set", "frozenset", "iterator"):
        kind = iter if tag == "iterator" else getattr(builtins, tag)
        return kind([unpack(item, names, things) for item in inner])
    if tag == "complex":
        return complex(*map(float.fromhex, inner))
    simple = {"int": lambda text: int(text, 16), "float": float.fromhex, "bytes": bytes.fromhex,
              "name": names, "thing": things, "type": _TYPES.get}  # fmt: skip
    return simple[tag](inner)


def send(pipe, message) -> None:
    """Write one JSON line. Raises ValueError when it is over MAX_FRAME."""
    line = json.dumps(message).encode()
    if len(line) >= MAX_FRAME:
        raise ValueError("a value is too large")
    pipe.write(line + b"\n")
    pipe.flush()


def receive(pipe):
    """Read one JSON line. Raises EOFError at the end and for a line over MAX_FRAME."""
    line = pipe.readline(MAX_FRAME + 1)
    if not line.endswith(b"\n"):
        raise EOFError("the solution ended")
    return json.loads(line)


# ---- the three processes ------------------------------------------------------------------------


def solution(code: str, requests, answers) -> None:
    """Run the model's code, then answer requests for its names and calls of its functions.

    An exception is the last answer.
    """
    scope = {"__name__": "solution"}
    things: list = []
    try:
        exec(compile(code, "solution.py", "exec", dont_inherit=True), scope)
        while True:
            name, call = receive(requests)
            if call is None and callable(scope[name]):
                send(answers, ["callable", None])
                continue
            found = scope[name]
            if call is not None:
                args, kwargs = unpack(call, scope.__getitem__, things.__getitem__)
                found = found(*args, **kwargs)
            send(answers, ["value", pack(found, things)])
    except Exception as error:
        send(answers, ["error", f"{type(error).__name__}: {error}"[:300]])


def run_tests(tests: list[str], requests, answers) -> dict:
    """Run the tests on what the solution answers; the first that fails ends it."""

    def ask(name, call=None):
        with suppress(BrokenPipeError):  # its last answer says why it ended
            send(requests, [name, call])
        kind, value = receive(answers)
        if kind == "callable":
            return Name(name, ask)
        if kind == "error":
            raise RuntimeError(f"in the solution: {value}")
        return unpack(value, lambda text: Name(text, ask), Thing)

    scope = {"__name__": "tests"}
    passed = 0
    try:
        for name in free_names(tests):
            scope[name] = ask(name)
        for test in tests:
            exec(compile(test, "tests.py", "exec", dont_inherit=True), scope)
            passed += 1
    except BaseException as error:  # SystemExit of a test too: only a full count is a pass
        return {"passed": passed, "why": f"{type(error).__name__}: {error}"[:300]}
    return {"passed": passed, "why": ""}


def free_names(tests: list[str]) -> list[str]:
    """Return the names that the tests take from the solution: read, not defined, not imported.

    A builtin stays Python's own, or `all` and `isinstance` would be the model's; but tests that
    name nothing else test a function of the model's that is called `sum`.
    """
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    read = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.alias):
            read.discard((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            read.discard(node.name)
        elif isinstance(node, ast.arg):
            read.discard(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            read.discard(node.id)
    return sorted(read - set(dir(builtins)) or read)


def run_both(job: dict, program: bytes | None) -> dict:
    """Fork the solution, shut both processes in, run the tests; return their outcome."""
    request_out, request_in = os.pipe()
    answer_out, answer_in = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            keep = {request_out, answer_in}
            for fd in set(range(3, 64)) - keep:  # the verdict's pipe among them
                with suppress(OSError):
                    os.close(fd)
            limit_resources(job["limits"])
            if program:
                filter_system_calls(program)
            solution(job["code"], os.fdopen(request_out, "rb"), os.fdopen(answer_in, "wb"))
        finally:
            os._exit(1)
    os.close(request_out)
    os.close(answer_in)
    limit_resources(job["limits"])
    if program:
        filter_system_calls(program)
    return run_tests(job["tests"], os.fdopen(request_in, "wb"), os.fdopen(answer_out, "rb"))


def world(job: dict, missing: dict) -> dict:
    """Build the walls, then run both sides. `missing` names each wall that cannot be had, and why.

    Runs in the first process after `enter_namespaces`. Nothing runs without a wall to the network.
    """
    program, has_root = None, "namespaces" not in missing
    if has_root:
        try:
            enter_own_root(job["root"], job["libraries"])
        except OSError as error:
            missing["own file system"], has_root = str(error), False
    try:
        drop_privileges()
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except OSError as error:
        missing["own user"] = str(error)
    try:
        if "seccomp" in job["without"]:
            raise OSError("left out")
        filter_system_calls(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allows all: a trial
        program = seccomp_filter(os.uname().machine, may_write=has_root)
    except OSError as error:
        missing["seccomp"] = str(error)
    if "namespaces" in missing and program is None:
        return {"passed": 0, "why": "no wall to the network", "refused": True}
    return run_both(job, program)


def main() -> None:
    """Read the job, enter the namespaces, and answer with what the tests said."""
    job = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    missing: dict[str, str] = {}
    try:
        if "namespaces" in job["without"]:
            raise OSError("left out")
        enter_namespaces()
    except OSError as error:
        missing["namespaces"] = str(error)
    child = os.fork()
    if child == 0:
        outcome = world(job, missing)
        os.write(verdict, json.dumps(outcome | {"missing": missing}).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.killpg(0, signal.SIGKILL)  # nothing outlives the verdict, this process neither


if __name__ == "__main__":
    main()
