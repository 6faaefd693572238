"""The system calls that Python 3.11 has no function for. Linux only; each raises `OSError` with the name of the call."""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
MNT_DETACH = 2

_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _NO_NEW_PRIVS, _SUBREAPER, _SECCOMP = 1, 4, 24, 38, 36, 22
_SIGKILL = 9
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # from 424 on, system calls have the same number on every architecture

# Kernel name of the architecture -> its audit number, and the column of its numbers below.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_PIVOT_ROOT = (155, 41)
_SOCKETS = ((41, 198), (53, 199))  # socket, socketpair
# What is refused: `(x86-64, ARM64)`; None where the architecture lacks it.
_REFUSED: dict[str, tuple[int, int | None]] = {
    # ways to memory that no limit counts, or that outlives its process
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "vmsplice": (278, 75),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # ways to other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    # ways to new namespaces, mounts, files by handle
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # features with a history of holes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "personality": (135, 92),
}
# From 424 on: io_uring, new mounts, clone3, pidfd_getfd, rules of Landlock (kernel memory), memfd_secret.
_REFUSED_EVERYWHERE = [425, 426, 427, 428, 429, 430, 431, 432, 435, 438, 442, 444, 445, 446, 447]
_CLONE3 = 435

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _machine() -> str:
    return os.uname().machine


def unshare(flags: int) -> None:
    """New namespaces for this process; a new PID namespace for its children."""
    _checked("unshare", _libc.unshare(flags))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = (source.encode(), target.encode(), kind.encode() if kind else None)
    _checked(f"mount {target}", _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()))


def restrict_mounts(path: str, attributes: int) -> None:
    """Adds attributes to every mount at and below `path`."""
    attr = struct.pack("=QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, path.encode(), ctypes.c_uint(_AT_RECURSIVE), attr, ctypes.c_size_t(len(attr))
    )
    _checked("mount_setattr", result)


def become_root_folder(path: str) -> None:
    """Makes `path`, a mount point, the root of this process's file system, and lets go of everything else."""
    os.chdir(path)
    if _machine() not in _ARCHITECTURES:
        raise OSError(f"pivot_root: its number on {_machine()} is not known")
    _checked("pivot_root", _libc.syscall(_PIVOT_ROOT[_ARCHITECTURES[_machine()][1]], b".", b"."))
    _checked("umount", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def die_with_parent() -> None:
    _checked("prctl", _libc.prctl(_PDEATHSIG, _SIGKILL, 0, 0, 0))


def hide_from_other_processes() -> None:
    """No process without capabilities can trace this one, or open what it has under /proc."""
    _checked("prctl", _libc.prctl(_DUMPABLE, 0, 0, 0, 0))


def adopt_orphans() -> None:
    """Processes below this one whose parent ends become its children."""
    _checked("prctl", _libc.prctl(_SUBREAPER, 1, 0, 0, 0))


def drop_capabilities() -> None:
    """Every capability, for good."""
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # past the last that this kernel knows, or not permitted: then there is none to drop
    header = struct.pack("=Ii", 0x20080522, 0)
    _checked("capset", _libc.capset(header, bytes(24)))


def forbid_new_privileges() -> None:
    _checked("prctl", _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def filter_system_calls() -> None:
    """Refuses, for good, the calls above and every socket but local ones. Needs `forbid_new_privileges` first."""
    if _machine() not in _ARCHITECTURES:
        raise OSError(f"seccomp: the system calls of {_machine()} are not known")
    audit, column = _ARCHITECTURES[_machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, compare, return
    allow, kill, denied, absent = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # 0x0005....: errno EPERM, ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, kill)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, denied)]  # x32 has other numbers
    program += [(equal, 0, 1, _CLONE3), (answer, 0, 0, absent)]  # libc then uses clone
    refused = [numbers[column] for numbers in _REFUSED.values()]
    for number in [*(one for one in refused if one is not None), *_REFUSED_EVERYWHERE]:
        program += [(equal, 0, 1, number), (answer, 0, 0, denied)]
    for number in (numbers[column] for numbers in _SOCKETS):  # the family is the first argument; AF_UNIX is 1
        program += [(equal, 0, 4, number), (load, 0, 0, 16), (equal, 1, 0, 1), (answer, 0, 0, denied), (answer, 0, 0, allow)]
    program += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    _checked("seccomp", _libc.prctl(_SECCOMP, 2, ctypes.byref(_Filter(len(program), ctypes.addressof(code))), 0, 0))


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
