"""What a process may do no more, from now on and for good: limits, a system-call filter, file access.

Stand-alone (standard library only): the confined process imports it by path. No privileges are needed, and
no name spaces, which many sites and containers forbid: seccomp (Linux 3.5) refuses sockets, new processes,
signals to and looks into other ones; Landlock (Linux 5.13) leaves the private folder to write and Python's
own folders to read. Without Landlock nothing at all may be written, and every readable file can be read.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

_NO_NEW_PRIVS, _SET_SECCOMP, _SET_PDEATHSIG, _FILTER = 38, 22, 1, 2
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06

# (x86_64, aarch64); None: there is no such call.
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network (socketpair stays: asyncio wakes itself by one)
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    # processes and signals
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "setpgid": (109, 154), "setsid": (112, 157), "tkill": (200, 130), "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "setrlimit": (160, 164),
    # memory that RLIMIT_AS does not count, and kernel interfaces that nobody needs
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268),
    "chroot": (161, 51), "open_by_handle_at": (304, 265), "personality": (135, 92),
    # what other processes of the user run on
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # of files, what Landlock does not know
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "mknod": (133, None), "mknodat": (259, 33),
}  # fmt: skip
_CHANGES: dict[str, tuple[int | None, int | None]] = {  # refused where there is no Landlock
    "creat": (85, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36),
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0x400000  # O_TMPFILE's own bit
_CLONE_THREAD = 0x10000

Instruction = tuple[int, int, int, int]


class CannotConfine(OSError):
    """This machine has no system-call filter for us."""


def supported() -> str | None:
    """Why processes cannot be confined here; None if they can."""
    if not sys.platform.startswith("linux"):
        return f"the system is {sys.platform}, and processes are confined by Linux's seccomp"
    if platform.machine() not in _ARCH:
        return f"the processor is {platform.machine()}, and the filter is written for {', '.join(_ARCH)}"
    return None


def limit(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Hard limits of this process. There is none on processes: RLIMIT_NPROC counts all of the user's, the
    trainer's threads included; the filter refuses new processes, and threads take address space."""
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def confine(writable: str, readable: list[str]) -> bool:
    """Filter this process and all it may become; True if Landlock guards files too. Raises CannotConfine."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SET_PDEATHSIG, 9, 0, 0, 0)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise CannotConfine(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS was refused")
    guarded = _landlock(libc, writable, readable)
    program = b"".join(struct.pack("HBBI", *line) for line in _program(writes=guarded))
    buffer = ctypes.create_string_buffer(program, len(program))
    where = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(where), 0, 0) != 0:
        raise CannotConfine(ctypes.get_errno(), "this kernel or container takes no seccomp filter")
    return guarded


# --- the system-call filter: classic BPF, (code, jump if true, jump if false, value) -----------------
def _program(*, writes: bool) -> list[Instruction]:
    column, arch = _ARCH[platform.machine()]
    own = os.getpid()
    lines: list[Instruction] = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, arch), (_RET, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 calls would go by other numbers
        lines += [(_JGE, 0, 1, 0x40000000), (_RET, 0, 0, _ERRNO | _ENOSYS)]
    refused = _REFUSED if writes else {**_REFUSED, **_CHANGES}
    for numbers in refused.values():
        number = numbers[column]
        if number is not None:
            lines += [(_JEQ, 0, 1, number), (_RET, 0, 0, _ERRNO | _EPERM)]
    # glibc goes back to clone and openat, whose arguments a filter can see.
    lines += [(_JEQ, 0, 1, 435), (_RET, 0, 0, _ERRNO | _ENOSYS)]  # clone3
    lines += _unless((56, 220)[column], 0, (_JSET, _CLONE_THREAD))
    lines += _unless((62, 129)[column], 0, (_JEQ, own))  # kill
    lines += _unless((234, 131)[column], 0, (_JEQ, own))  # tgkill
    lines += _unless((302, 261)[column], 2, (_JEQ, 0))  # prlimit64: asking is allowed
    lines += _if((72, 25)[column], 1, [8, 10, 15])  # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX send signals
    lines += _if((16, 29)[column], 1, [0x8901, 0x8902, 0x5412])  # ioctl: FIOSETOWN, SIOCSPGRP, TIOCSTI
    if not writes:
        lines += [(_JEQ, 0, 1, 437), (_RET, 0, 0, _ERRNO | _ENOSYS)]  # openat2
        lines += _if_bits((257, 56)[column], 2, _WRITES)
        if column == 0:
            lines += _if_bits(2, 1, _WRITES)  # open
    return [*lines, (_RET, 0, 0, _ALLOW)]


def _argument(number: int, index: int, tests: list[Instruction]) -> list[Instruction]:
    """`tests` on the low half of an argument of the call `number`, the last of which returns."""
    return [(_JEQ, 0, len(tests) + 1, number), (_LOAD, 0, 0, 16 + 8 * index), *tests]


def _unless(number: int, index: int, test: tuple[int, int]) -> list[Instruction]:
    code, value = test
    return _argument(
        number, index, [(code, 1, 0, value), (_RET, 0, 0, _ERRNO | _EPERM), (_RET, 0, 0, _ALLOW)]
    )


def _if(number: int, index: int, values: list[int]) -> list[Instruction]:
    tests: list[Instruction] = []
    for value in values:
        tests += [(_JEQ, 0, 1, value), (_RET, 0, 0, _ERRNO | _EPERM)]
    return _argument(number, index, [*tests, (_RET, 0, 0, _ALLOW)])


def _if_bits(number: int, index: int, bits: int) -> list[Instruction]:
    return _argument(
        number, index, [(_JSET, 0, 1, bits), (_RET, 0, 0, _ERRNO | _EPERM), (_RET, 0, 0, _ALLOW)]
    )


# --- Landlock ------------------------------------------------------------------------------------------
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FIRST_ABI = (1 << 13) - 1


def _landlock(libc: ctypes.CDLL, writable: str, readable: list[str]) -> bool:
    """Nothing but what is named may be opened, made or removed. False where the kernel has no Landlock."""
    attributes = ctypes.create_string_buffer(struct.pack("Q", _FIRST_ABI), 8)
    ruleset = libc.syscall(_CREATE, attributes, 8, 0)
    if ruleset < 0:
        return False
    places = [(path, _EXECUTE | _READ_FILE | _READ_DIR) for path in readable]
    places += [(path, _READ_FILE | _WRITE_FILE) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    places.append((writable, _FIRST_ABI & ~_EXECUTE))
    for path, access in places:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        if not os.path.isdir(path):
            access &= _EXECUTE | _WRITE_FILE | _READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, place), 12)
        failed = libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(place)
        if failed:
            raise CannotConfine(ctypes.get_errno(), f"Landlock takes no rule for {path}")
    failed = libc.syscall(_RESTRICT, ruleset, 0)
    os.close(ruleset)
    if failed:
        raise CannotConfine(ctypes.get_errno(), "Landlock refused its rules")
    return True
