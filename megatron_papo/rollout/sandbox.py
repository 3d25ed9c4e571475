"""What a grading process gives up before it reads model text: the network, files, other processes, memory.

Three layers of Linux, none of which needs privileges or a library: resource limits; a seccomp filter, a list of the
system calls that computing needs; Landlock, which leaves the directories of the imported libraries readable and nothing
else. Once given up, nothing comes back, whatever code runs in the process. docs/reliability.md says what holds where.
"""

import ctypes
import os
import platform
import resource
import signal
from collections.abc import Iterable
from pathlib import Path

MEMORY_LIMIT_BYTES = 512 << 20
"""Address space of a grading process, which has 60 MB of it once everything is imported."""
OPEN_FILES = 32

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
LOAD, IF_EQUAL, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
"""Of the classic BPF machine: load a word at an offset of seccomp_data, jump, end with a verdict."""
NUMBER, ARCHITECTURE, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 4, 24, 32
"""Offsets in seccomp_data; of the arguments the lower half, as both machines below are little-endian."""
ALLOW, REFUSE, REFUSE_AS_MISSING = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
"""Verdicts: go on; EPERM; ENOSYS, upon which libraries fall back to an older call that is allowed."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)

# fmt: off
CALLS = {
    "x86_64": {  # AUDIT_ARCH_X86_64; the x32 calls carry another bit and match none of these
        "architecture": 0xC000003E, "open": 2, "openat": 257,
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "pread64": 17, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28,
        "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "getdents": 78, "getcwd": 79,
        "readlink": 89, "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "sigaltstack": 131, "gettid": 186,
        "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219,
        "clock_gettime": 228, "clock_getres": 229, "exit_group": 231, "newfstatat": 262, "readlinkat": 267,
        "faccessat": 269, "set_robust_list": 273, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
        "faccessat2": 439,
    },
    "aarch64": {
        "architecture": 0xC00000B7, "openat": 56,
        "getcwd": 17, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62, "read": 63,
        "write": 64, "readv": 65, "writev": 66, "pread64": 67, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
        "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99, "setitimer": 103,
        "clock_gettime": 113, "clock_getres": 114, "sched_getaffinity": 123, "sched_yield": 124,
        "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "uname": 160, "getrusage": 165, "gettimeofday": 169, "getpid": 172, "gettid": 178, "sysinfo": 179, "brk": 214,
        "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
        "membarrier": 283, "statx": 291, "rseq": 293, "faccessat2": 439,
    },
}
# fmt: on
"""The system calls that a process which computes, imports and answers needs, by their numbers on each machine."""
OPENAT2 = 437

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_BENEATH = 1, 1
READ_FILE, READ_DIRECTORY = 1 << 2, 1 << 3
FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}
"""Everything that a version of Landlock can forbid on files; from version 5 on also the calls of devices."""
ALL_FILE_RIGHTS, ALL_TCP, ALL_SCOPES = 0xFFFF, 0b11, 0b11


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("directory", ctypes.c_int32)]


_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def confine(readable: Iterable[Path]) -> list[str]:
    """Give up everything but computing, reading below `readable` and the descriptors that are open. For good.

    Returns which of "seccomp" and "landlock" this kernel or container lacks; the resource limits hold in any case.
    """
    _limit_resources()
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    layers = {"landlock": _restrict_files(readable), "seccomp": _filter_calls()}
    return [name for name, holds in layers.items() if not holds]


def _limit_resources() -> None:
    limits = {
        resource.RLIMIT_AS: MEMORY_LIMIT_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _filter_calls() -> bool:
    """Refuse every system call but CALLS, and opening a file for writing. Returns whether it holds."""
    calls = dict(CALLS.get(platform.machine(), {}))
    if not calls:
        return False
    program = _filter_program(calls)
    instructions = (_Instruction * len(program))(*(_Instruction(*fields) for fields in program))
    filter_ = _Program(len(program), instructions)
    return _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0) == 0


def _filter_program(calls: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Return the filter: instructions (code, jump if true, jump if false, operand), the jumps counted from the next."""
    opening = [
        (calls[name], where) for name, where in (("open", SECOND_ARGUMENT), ("openat", THIRD_ARGUMENT)) if name in calls
    ]
    plain = sorted(number for name, number in calls.items() if name not in ("architecture", "open", "openat"))
    program = [(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, calls["architecture"]), (RETURN, 0, 0, REFUSE)]
    program += [(LOAD, 0, 0, NUMBER), (IF_EQUAL, 0, 1, OPENAT2), (RETURN, 0, 0, REFUSE_AS_MISSING)]
    for number, flags in opening:
        program += [(IF_EQUAL, 0, 4, number), (LOAD, 0, 0, flags), (IF_ANY_BIT, 0, 1, WRITING)]
        program += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    for number in plain:
        program += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, REFUSE)]


def _restrict_files(readable: Iterable[Path]) -> bool:
    """Forbid every use of files but reading below `readable`, TCP, and signals to others. Returns whether it holds."""
    version = _libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return False
    rules = _Ruleset(FILE_RIGHTS.get(version, ALL_FILE_RIGHTS), ALL_TCP, ALL_SCOPES)
    size = 8 if version < 4 else 16 if version < 6 else 24  # older kernels know fewer fields
    ruleset = _libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        return False
    for directory in readable:
        descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        beneath = _Beneath(READ_FILE | READ_DIRECTORY, descriptor)
        _libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_BENEATH, ctypes.byref(beneath), 0)
        os.close(descriptor)
    holds = _libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return holds
