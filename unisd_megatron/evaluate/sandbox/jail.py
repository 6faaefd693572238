"""What a program is locked into. Works for root and, where the kernel allows user namespaces, for anybody."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path

from unisd_megatron.evaluate.sandbox import kernel
from unisd_megatron.evaluate.sandbox.limits import Limits

NOBODY = 65534
SCRATCH = "/tmp"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_MIB = 1 << 20
_OWN_PROCESSES = 3  # zygote, keeper and judge are of the same user as the program, unless root started them


def map_ids(pid: int) -> None:
    """Says who the ids in the new user namespace of `pid` are outside it. For a process that is not in it."""
    root = os.geteuid() == 0
    if not root:
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        # Inside, the program is `nobody`; so it is outside where root may choose, else it is the user who runs us.
        Path(f"/proc/{pid}/{kind}_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1")


def enter(control: socket.socket) -> None:
    """Puts this process into namespaces of its own and into a file system of the Python libraries, all read-only.

    Asks at `control` for `map_ids`: sends one byte and waits for one. Raises `OSError` where the machine refuses.
    """
    Path("/proc/self/oom_score_adj").write_text("1000")  # inherited: if memory runs short, the kernel ends these first
    with open("/proc/sys/user/max_user_namespaces") as limit:
        if int(limit.read()) == 0:
            raise OSError("user namespaces are switched off (user.max_user_namespaces is 0)")
    new = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(new)
    control.sendall(b"m")
    if control.recv(1) != b"m":
        raise OSError("the ids of the user namespace were not mapped")
    Path("/proc/sys/user/max_user_namespaces").write_text("0")  # of the namespace just made: there will be none inside it
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("root", SCRATCH, "tmpfs", kernel.MS_NOSUID, "size=1m,mode=755")
    _furnish(SCRATCH)
    kernel.become_root_folder(SCRATCH)


def _furnish(root: str) -> None:
    prefixes = {str(Path(prefix, "lib")) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    for source in sorted({*_LIBRARIES, *prefixes}):
        place = Path(root + source)
        if place.exists() or not os.path.exists(source):  # below one that is there already, or not of this machine
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(source):
            place.symlink_to(os.readlink(source))
        else:
            _bind(source, place)
    kernel.restrict_mounts(root, kernel.ATTR_NOSUID | kernel.ATTR_NODEV)
    for source in _DEVICES:
        Path(root + source).parent.mkdir(exist_ok=True)
        _bind(source, Path(root + source))
    Path(root + SCRATCH).mkdir(exist_ok=True)
    kernel.restrict_mounts(root, kernel.ATTR_RDONLY | kernel.ATTR_NOSUID)


def _bind(source: str, place: Path) -> None:
    if os.path.isdir(source):
        place.mkdir()
    else:
        place.touch()
    kernel.mount(source, str(place), None, kernel.MS_BIND | kernel.MS_REC)


def new_scratch(limits: Limits) -> None:
    """For one program: an empty scratch folder in memory, an IPC of its own, and, from the next fork on, no other processes."""
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID)
    options = f"size={limits.scratch_mib}m,nr_inodes=4096,mode=1777"
    kernel.mount("scratch", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)


def new_processes() -> None:
    """From the next fork on, no sight of this process either."""
    kernel.unshare(kernel.CLONE_NEWPID)


def give_up_rights(limits: Limits, namespaces: bool, system_calls: bool) -> None:
    """No user, capability or limit that could be raised again; inherited by all processes of the program."""
    for name, soft, hard in _rlimits(limits, namespaces):
        top = resource.getrlimit(name)[1]
        if top != resource.RLIM_INFINITY:
            soft, hard = min(soft, top), min(hard, top)
        resource.setrlimit(name, (soft, hard))
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container without other users; `host.py` finds that root stayed root
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    kernel.hide_from_other_processes()
    if system_calls:
        kernel.filter_system_calls()
    kernel.die_with_parent()  # last: a change of user forgets it


def _rlimits(limits: Limits, namespaces: bool) -> list[tuple[int, int, int]]:
    """`(which, soft, hard)`."""
    memory, file = limits.memory_mib * _MIB, limits.file_mib * _MIB
    chosen = [
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file, file),
        (resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 1),  # the soft limit's signal can be caught, the hard one's not
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_SIGPENDING, 256, 256),  # timers too, each some memory of the kernel
    ]
    if namespaces:  # outside a user namespace, all other processes of the user would count
        allowed = limits.processes + _OWN_PROCESSES
        chosen.append((resource.RLIMIT_NPROC, allowed, allowed))
    return chosen
