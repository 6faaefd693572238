"""Programs that mean harm or want a pass that they have not earned; `test_hostile.py` runs them all.

Each is asked for `f` with `f(2) == 4` and `f(3) == 9`. Those named "... works" would pass if what they try worked: `f` is
right if the attack succeeded. $CANARY, $PID, $PORT and $SOCKET stand for a file, a process, and two listeners of the host.
"""

TESTS = "assert f(2) == 4\nassert set([f(3)]) == set([9])"
HONEST = "def f(x):\n    return x * x\n"
_SAY = (
    "import json, os, struct\ndef say(what):\n    data = json.dumps(what).encode()\n"
    "    os.write(3, struct.pack('=I', len(data)) + data)\n"
)
_IF_WORKED = "\ndef f(x):\n    return x * x if worked else None\n"


def attempt(*lines: str) -> str:
    """A program that is right if the lines run to their end without an exception."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"import os, sys\nworked = False\ntry:\n{body}    worked = True\nexcept Exception:\n    pass\n{_IF_WORKED}"


def _kernel(call: str, times: int = 1) -> str:
    """A program that is right if the C library's `call`, or a system call of this number, is not refused."""
    numbers = {"mq_open": (240, 180), "io_setup": (206, 0), "add_key": (248, 217), "bpf": (321, 280), "userfaultfd": (323, 282)}
    names = [f"{name} = {pair}[os.uname().machine == 'aarch64']" for name, pair in numbers.items()]
    return attempt("import ctypes, struct", *names, f"for _ in range({times}): assert ctypes.CDLL(None).{call} >= 0")


HOSTILE = {
    # Taking everything.
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "memory bomb": "held = []\nwhile True: held.append(bytearray(1 << 20))\n",
    "memory bomb of many processes": (
        "import os\nfor _ in range(64):\n    try:\n        if not os.fork(): break\n    except OSError: break\n"
        "held = []\nwhile True: held.append(b'x' * (1 << 20))\n"
    ),
    "endless loop": "while True: pass\n",
    "endless loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
    "endless sleep": "import time\ntime.sleep(10**6)\n",
    "endless loop in the function": "def f(x):\n    while True: pass\n",
    "endless output": "while True: print('x' * 4096)\n",
    "endless output to standard error": "import os\nwhile True: os.write(2, b'x' * 4096)\n",
    "huge file": "with open('big', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))\n",
    "huge files": (
        "n = 0\nwhile True:\n    n += 1\n    try:\n        with open(str(n), 'wb') as file: file.write(b'x' * (8 << 20))\n"
        "    except OSError as error:\n        if n > 1000: raise\n"
    ),
    "endless files": "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()\n",
    "thread bomb": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(10**6,)).start()\n"
        "    except RuntimeError: pass\n"
    ),
    "endless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)\n",
    "recursion of the C stack": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)\n",
    "nested source": "x = " + "(" * 5000 + ")" * 5000,
    "nested operators": "x = " + "-" * 200_000 + "1",
    "crash": "import ctypes\nctypes.string_at(0)\n",
    "huge answer": "def f(x): return 'x' * (100 << 20)\n",
    "answer that contains itself": "def f(x):\n    found = []\n    found.append(found)\n    return found\n",
    "unlimited rights to raise limits works": attempt(
        "import resource", "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"
    ),
    "more processes by a limit raised works": attempt(
        "import resource", "resource.setrlimit(resource.RLIMIT_NPROC, (10**5, 10**5))"
    ),
    "many processes that each hold what one may": (
        "import os, time\nfor _ in range(6):\n    try:\n        if not os.fork(): break\n    except OSError: break\n"
        "held = b'x' * (150 << 20)\ntime.sleep(10**6)\n"
    ),
    "shared memory that is in no process's pages": (
        "import mmap, os, time\nfor _ in range(6):\n    held = mmap.mmap(-1, 100 << 20)\n    held.write(b'x' * (50 << 20))\n"
        "    try:\n        if not os.fork(): break\n    except OSError: break\n    held.close()\ntime.sleep(10**6)\n"
    ),
    "memory that no limit counts works": attempt("os.memfd_create('held')"),
    "shared memory works": _kernel("shmget(0, 1 << 20, 0o1600)"),
    "semaphores works": _kernel("semget(0, 32000, 0o1600)"),
    "message queues works": _kernel("msgget(0, 0o1600)"),
    "a named message queue works": _kernel("syscall(mq_open, b'queue', os.O_RDWR | os.O_CREAT, 0o600, None)"),
    "asynchronous input and output works": _kernel("syscall(io_setup, 1000, ctypes.byref(ctypes.c_long()))"),
    "io_uring works": _kernel("syscall(425, 64, ctypes.create_string_buffer(120))"),
    "watched files works": _kernel("inotify_init1(0)"),
    "watched mounts works": _kernel("fanotify_init(0x200, 0)"),
    "pages kept in a pipe works": _kernel("vmsplice(os.pipe()[1], (ctypes.c_size_t * 2)(id(os), 1), 1, 0)"),
    "keys works": _kernel("syscall(add_key, b'user', b'name', b'x', 1, -3)"),
    "BPF works": _kernel("syscall(bpf, 0, ctypes.create_string_buffer(struct.pack('=IIII', 2, 4, 4, 1), 72), 72)"),
    "faults of one's own works": _kernel("syscall(userfaultfd, 1)"),
    "rules of Landlock works": _kernel("syscall(444, None, 0, 1)"),
    "timers without end works": _kernel("timer_create(0, None, ctypes.byref(ctypes.c_void_p()))", times=1000),
    "priority works": attempt("os.nice(-10)"),
    # Reaching the host.
    "deleting the home": (
        "import os, shutil\nshutil.rmtree(os.path.expanduser('~'), ignore_errors=True)\nos.remove('$CANARY')\n"
    ),
    "deleting everything": (
        "import os, shutil\nfor top in ('/root', '/home', '/usr', '/lib', '/tmp', '/'):\n"
        "    shutil.rmtree(top, ignore_errors=True)\nos.remove('$CANARY')\n"
    ),
    "writing to the libraries works": attempt("open(os.__file__, 'a').close()"),
    "writing to the root works": attempt("open('/new', 'w').close()"),
    "writing to a file of the host works": attempt("open('$CANARY', 'a').close()"),
    "reading a file of the host works": attempt("open('$CANARY').read()"),
    "reading a file of the host over a link works": attempt("os.symlink('$CANARY', 'link')", "open('link').read()"),
    "a hard link to a file of the host works": attempt("os.link('$CANARY', 'link')"),
    "climbing out by relative paths works": attempt("open('../' * 50 + '$CANARY').read()"),
    "reading the passwords works": attempt("open('/etc/shadow').read()"),
    "reading the users works": attempt("open('/etc/passwd').read()"),
    "reading another process works": attempt("open('/proc/1/environ', 'rb').read()"),
    "reading the environment works": attempt("assert any('secret' in value for value in os.environ.values())"),
    "reading the environment of the C library works": attempt(
        "import ctypes",
        "ctypes.CDLL(None).getenv.restype = ctypes.c_char_p",
        "assert ctypes.CDLL(None).getenv(b'UNISD_SECRET')",
    ),
    "connecting to the host works": attempt("import socket", "socket.create_connection(('127.0.0.1', $PORT), 2)"),
    "connecting to the world works": attempt("import socket", "socket.create_connection(('1.1.1.1', 53), 2)"),
    "a socket of any family works": attempt("import socket", "socket.socket(40, socket.SOCK_STREAM)"),
    "resolving a name works": attempt("import socket", "socket.getaddrinfo('example.com', 80)"),
    "an abstract socket of the host works": attempt("import socket", "socket.socket(socket.AF_UNIX).connect('\\0$SOCKET')"),
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
    "killing everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(1, signal.SIGKILL)\n",
    "killing the group": "import os, signal\nos.killpg(0, signal.SIGKILL)\nos.kill(0, signal.SIGTERM)\n",
    "stopping the group": "import os, signal\nos.kill(0, signal.SIGSTOP)\n",
    "signalling the host works": attempt("os.kill($PID, 0)"),
    "stopping the parent works": attempt("import signal", "assert os.getppid() != 0", "os.kill(os.getppid(), signal.SIGSTOP)"),
    "tracing the parent works": attempt(
        "import ctypes", "assert ctypes.CDLL(None).ptrace(16, max(1, os.getppid()), 0, 0) == 0"
    ),
    "a limit of another process works": attempt("import resource", "resource.prlimit($PID, resource.RLIMIT_CPU, (0, 0))"),
    "becoming root works": attempt("os.setuid(0)"),
    "a new namespace works": attempt("import ctypes", "assert ctypes.CDLL(None).unshare(0x10000000) == 0"),
    "a new root works": attempt("os.chroot('/tmp')"),
    "a mount works": attempt("import ctypes", "assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0"),
    "a device works": attempt("import stat", "os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))"),
    "a shell works": attempt("import subprocess", "subprocess.run(['/bin/sh', '-c', 'true'], check=True)"),
    "an executable of one's own works": attempt(
        "import subprocess",
        "open('run', 'w').write('#!' + sys.executable)",
        "os.chmod('run', 0o755)",
        "subprocess.run(['./run'])",
    ),
    "a daemon that stays": (
        "import ctypes, os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        "        ctypes.CDLL(None).prctl(15, b'hostile-daemon', 0, 0, 0)\n        time.sleep(10**6)\n    os._exit(0)\n"
        "def f(x): return None\n"
    ),
    # A pass that is not earned.
    "sys.exit": "import sys\nsys.exit(0)\n",
    "sys.exit in the function": "import sys\ndef f(x): sys.exit(0)\n",
    "os._exit before the tests": "import os\nos._exit(0)\n",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)\n",
    "an end at exit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)\n",
    "an exception that is no error": "def f(x): raise KeyboardInterrupt\n",
    "a signal to itself": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nos.abort()\n",
    "a patched assertion": (
        "import builtins, sys\nclass AssertionError(Exception):\n    def __new__(cls, *a): sys.exit(0)\n"
        "builtins.AssertionError = AssertionError\nsys.excepthook = lambda *a: None\ndef f(x): return None\n"
    ),
    "a tracer that swallows": (
        "import sys\ndef trace(frame, event, arg):\n    frame.f_trace_lines = False\n    return trace\n"
        "sys.settrace(trace)\nsys.setprofile(lambda *a: None)\ndef f(x): return None\n"
    ),
    "patched builtins": (
        "import builtins, operator\nfor name in ('isinstance', 'all', 'any', 'set', 'list', 'repr', 'type'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\noperator.eq = lambda a, b: True\ndef f(x): return None\n"
    ),
    "an object that equals everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = None\n    def __bool__(self): return True\ndef f(x): return Any()\n"
    ),
    "a number that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = int.__hash__\ndef f(x): return Any(7)\n"
    ),
    "a function that is an object that equals everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __call__(self, *a): return self\nf = Any()\n"
    ),
    "a class of another module's name": (
        "class f(int):\n    def __new__(cls, x): return int.__new__(cls, 7)\n    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\nf.__module__ = 'builtins'\nf.__name__ = f.__qualname__ = 'int'\n"
    ),
    "the mark of a pass": (
        "import os, struct\n"
        'for text in (b\'["passed", ""]\', b\'{"kind": "passed", "detail": "", "seconds": 0}\', b\'["ok", true]\'):\n'
        "    print(text.decode(), flush=True)\n    for fd in range(64):\n"
        "        try: os.write(fd, struct.pack('=I', len(text)) + text)\n"
        "        except OSError: pass\nos._exit(0)\n"
    ),
    "a forged answer for every call": (
        f"{_SAY}say(['ok', ['dict', ['f', ['object', 0, 'x']]]])\nfor _ in range(10): say(['ok', True])\nwhile True: pass\n"
    ),
    "a forged reference to a builtin": (
        f"{_SAY}say(['ok', ['dict', ['f', ['type', 'object']]]])\nfor _ in range(10): say(['ok', True])\n"
    ),
    "forged builtins of the tests": (
        f"{_SAY}say(['ok', ['dict', ['f', ['object', 0, 'x']], ['set', ['object', 1, 'x']],\n"
        "    ['__builtins__', ['dict', ['set', ['object', 1, 'x']]]]]])\n"
        "for value in (4, 8, 1, 1): say(['ok', value])\nimport time\ntime.sleep(3)\n"
    ),
    "a change of the harness": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if 'judge' in name:\n"
        "        module.verdict = module._run = lambda *a: ('passed', '')\n        module._end = lambda *a: ('passed', '')\n"
        "def f(x): return None\n"
    ),
    "the answers found in memory works": (
        "import gc, sys\nseen = []\nframe = sys._getframe()\n"
        "while frame:\n    seen.append(repr(frame.f_locals))\n    frame = frame.f_back\n"
        "seen += [repr(one) for one in gc.get_objects() if isinstance(one, (dict, list, tuple)) and len(one) < 100]\n"
        "worked = any(' == '.join(['assert f(2)', '4']) in text for text in seen)\n" + _IF_WORKED
    ),
}
