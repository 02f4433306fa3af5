"""The code reward: programs and functions that are right, wrong, and hostile."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.rewards.base import RewardSpec, make_reward
from hpc_rl.rewards.code import Asserts, Code, cases_of, last_block, passes
from hpc_rl.rewards.config import CodeConfig
from hpc_rl.rewards.sandbox.confine import supported
from hpc_rl.rewards.sandbox.process import Limits, run_program

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(supported() is not None, reason="no seccomp filter for this system or processor"),
]

ADD = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
QUICK = Limits(5.0, 512 << 20, 1 << 20)
SHORT = Limits(0.5, 512 << 20, 1 << 20)


@pytest.fixture(scope="module")
def reward() -> Code:
    return Code(CodeConfig(run_s=5.0, memory_mb=512, output_mb=1))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("hpc-rl-code-*")), "the private folder is removed"


def block(source: str) -> str:
    return f"Here it is.\n```python\n{source}\n```\nDone."


def score(reward: Code, source: str, tests: object, **fields: object) -> float:
    return reward.score("p", block(source), None, {"tests": tests, **fields})


def test_which_block_counts() -> None:
    assert last_block("```python\na\n```\n```py\nb\n```\n```\nc\n```") == "b\n"
    assert last_block("```\na\n```\n```bash\nls\n```") == "a\n"
    assert last_block("```python\nnever closed") is None
    assert last_block("print(1)") is None


def test_functions_against_asserts(reward: Code) -> None:
    right = "def add(a, b):\n    return a + b"
    assert score(reward, right, ADD) == 1.0
    assert score(reward, right, ADD.splitlines()) == 1.0
    assert score(reward, "def add(a, b):\n    return a - b", ADD) == 0.0
    assert score(reward, "def sub(a, b):\n    return a + b", ADD) == 0.0
    assert score(reward, "def add(a, b) return", ADD) == 0.0
    assert reward.score("p", "<think>" + block(right), None, {"tests": ADD}) == 0.0
    assert reward.score("p", "no code", None, {"tests": ADD}) == 0.0
    assert score(reward, right, "def test_add():\n    assert add(2, 2) == 4") == 1.0
    assert score(reward, right, "def test_add():\n    assert add(2, 2) == 5") == 0.0
    assert score(reward, right, "from solution import add\n" + ADD) == 1.0


def test_values_keep_their_types() -> None:
    source = """
def same(x): return x
def kind(x): return type(x).__name__
def sort(x): x.sort()
def fail(x): raise KeyError(x)
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def __private(self): return 1
"""
    tests = """
plain = [None, True, 1, -2.5, 10**30, "ä\\n", b"\\x00", 1j]
for x in [*plain, [1, [2]], (1, (2,)), {1, 2}, frozenset([1]), {(1, 2): [3]}]:
    assert same(x) == x and type(same(x)) is type(x) and kind(x) == type(x).__name__, x
assert same(float("inf")) == float("inf")
x = [3, 1, 2]
sort(x)
assert x == [1, 2, 3]
try:
    fail("k")
except KeyError as error:
    assert error.args == ("k",) or "k" in str(error)
else:
    raise AssertionError
stack = Stack()
stack.push(1).push([2])
assert stack.items == [1, [2]]
assert math.isclose(same(0.1), 0.1)
"""
    case = cases_of(tests, None)[0]
    assert isinstance(case, Asserts)
    namespace: dict[str, object] = {}
    exec(source, namespace)  # the tests themselves are right where everything is in one process
    exec("import math\n" + tests, namespace)
    assert passes(source, case, None, QUICK)


def test_check_and_entry_point() -> None:
    reward = Code(CodeConfig(tests="test", entry_point="entry"))
    row = {"test": "def check(candidate):\n    assert candidate(2) == 4", "entry": "double"}
    assert reward.score("p", block("def double(x): return 2 * x"), None, row) == 1.0
    assert reward.score("p", block("def double(x): return x"), None, row) == 0.0
    assert reward.score("p", block("def twice(x): return 2 * x"), None, row) == 0.0


def test_programs_against_pairs(reward: Code) -> None:
    double = "import sys\nfor line in sys.stdin:\n    print(2 * int(line), end=' \\n')"
    pairs = {"inputs": ["1\n2\n", "5"], "outputs": ["2\n4", "10\n"]}
    assert score(reward, double, pairs) == 1.0
    assert score(reward, double, '{"inputs": ["1"], "outputs": ["3"]}') == 0.0
    assert (
        score(reward, "if __name__ == '__main__':\n    print(input())", [{"input": "a", "output": "a"}])
        == 1.0
    )
    assert score(reward, "print('a')\nraise SystemExit(1)", [{"input": "", "output": "a"}]) == 0.0
    partial = Code(CodeConfig(partial=True))
    half = [{"input": "1", "output": "2"}, {"input": "2", "output": "5"}]
    assert partial.score("p", block(double), None, {"tests": half}) == 0.5


def test_tests_that_are_none_are_faults_of_the_data(reward: Code) -> None:
    for tests, message in [
        ([], "no test"),
        ("x = 1", "test nothing"),
        ('"""Only words."""', "test nothing"),
        ("def check(candidate):\n    assert candidate(1)", "set entry_point"),
        ("assert (", "no Python"),
        ({"inputs": ["1"], "outputs": []}, "as many"),
        ({"fn_name": "f", "inputs": [], "outputs": []}, "fn_name"),
        ([3], "Python text"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(reward, "x = 1", tests)
    with pytest.raises(ValueError, match="column 'tests'"):
        reward.score("p", "r", None, {})


HOSTILE = {
    "early exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
        "def add(a, b): return Any()"
    ),
    "an int that is equal to everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    def __int__(self): return 3\n"
        "def add(a, b): return Any()"
    ),
    "builtins replaced": (
        "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.all = builtins.any = lambda x: True\n"
        "def all(x): return True\ndef add(a, b): return 0"
    ),
    "the checker patched": (
        "import sys, json\nfor module in list(sys.modules.values()):\n"
        "    for name in ('passes', 'encode', 'decode', 'serve'):\n"
        "        if name in vars(module): setattr(module, name, lambda *a, **k: True)\n"
        "sys.modules['__main__'].Served._answer = lambda *a: {'value': True, 'changed': []}\n"
        "def add(a, b): return True"
    ),
    "nonsense on the wire": (
        "import os\nfor fd in range(3, 64):\n    try:\n"
        '        os.write(fd, b\'{"names": {"add": 0}}\\n[[[\\n\')\n'
        "    except OSError: pass\ndef add(a, b): return 3"
    ),
    "names that are none": (
        "import sys\nsys.modules['__main__'].Served._write = "
        "lambda s, m: (s._out.write('[]\\n'), s._out.flush())"
    ),
    "tests read from the wire": (
        "import os\nfor fd in range(0, 64):\n    try:\n"
        "        os.set_blocking(fd, False); data = os.read(fd, 99)\n"
        "    except OSError: continue\n    assert b'assert' not in data\ndef add(a, b): return 0"
    ),
    "deep recursion": "def add(a, b): return add(a, b)",
    "a value without end": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "a cycle": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "much output": "def add(a, b): return 'x' * 10**7",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_solutions_get_nothing(name: str) -> None:
    tests = ADD + "assert all([add(1, 2) == 3])\n"
    case = cases_of(tests, None)[0]
    assert isinstance(case, Asserts)
    assert not passes(HOSTILE[name], case, None, QUICK)


def test_loops_end_at_the_limit(reward: Code) -> None:
    began = time.monotonic()
    case = cases_of(ADD, None)[0]
    assert isinstance(case, Asserts)
    assert run_program("while True: pass", "", SHORT) is None
    assert run_program("import time\ntime.sleep(99)", "", SHORT) is None
    assert run_program("import os\nos.close(1)\nwhile True: pass", "", SHORT) is None
    assert not passes("def add(a, b):\n    while True: pass", case, None, SHORT)
    assert not passes("while True: pass", case, None, SHORT)
    big = cases_of("assert add('x' * 10**6, 0)", None)[0]
    assert isinstance(big, Asserts)
    assert not passes("import sys, time\ntime.sleep(99)\n", big, None, SHORT)
    assert time.monotonic() - began < 8


def test_resources_are_bounded() -> None:
    assert run_program("x = bytearray(10 << 30)\nprint('got it')", "", QUICK) is None
    assert run_program("while True: print('x' * 1000)", "", QUICK) is None
    assert run_program("open('f', 'wb').write(b'x' * (2 << 20))\nprint('ok')", "", QUICK) is None
    fork_bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError as e: print(e.errno); break"
    assert run_program(fork_bomb, "", QUICK) == "1\n"
    for start in (
        "subprocess.run(['true'])",
        "os.system('true')",
        "multiprocessing.Process(target=print).start()",
    ):
        source = f"import os, subprocess, multiprocessing\nassert {start} == 0"
        assert run_program(source, "", QUICK) is None, start
    threads = "import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()"
    assert run_program(threads, "", QUICK) == "hi\n"


def denied(code: str) -> str:
    """A program that says whether `code` raised an OSError."""
    lines = "\n".join("    " + line for line in code.splitlines())
    start = "import os, signal, socket, sys\ntry:\n"
    return f"{start}{lines}\nexcept OSError as e:\n    print('no')\nelse:\n    print('yes')"


def test_nothing_outside_is_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    server = socket.create_server(("127.0.0.1", 0))
    attempts = [
        f"open({str(outside / 'new')!r}, 'w')",
        f"open({str(outside / 'kept')!r}, 'a')",
        f"os.remove({str(outside / 'kept')!r})",
        f"os.rename({str(outside / 'kept')!r}, 'mine')",
        f"os.chmod({str(outside / 'kept')!r}, 0o777)",
        f"os.truncate({str(outside / 'kept')!r}, 0)",
        f"os.mkdir({str(outside / 'folder')!r})",
        f"os.symlink('/etc/passwd', {str(outside / 'link')!r})",
        f"os.utime({str(outside / 'kept')!r}, (0, 0))",
        "open(f'/proc/{os.getppid()}/mem', 'r+b')",
        "os.kill(os.getppid(), 0)",
        "os.kill(-1, 0)",
        "os.kill(0, signal.SIGKILL)",
        "os.killpg(os.getpgid(0), signal.SIGKILL)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.execv('/bin/true', ['true'])",
        f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
        "socket.socket(socket.AF_UNIX)",
    ]
    for attempt in attempts:
        assert run_program(denied(attempt), "", QUICK) == "no\n", attempt
    server.close()
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    environment = run_program("import os\nprint(sorted(os.environ))", "", QUICK)
    assert environment is not None and "PYTHONPATH" not in environment and "TOKEN" not in environment


def test_the_private_folder_is_empty_and_gone(tmp_path: Path) -> None:
    listed = run_program("import os\nprint(os.getcwd(), os.listdir())", "", QUICK)
    assert listed is not None
    folder, names = listed.split(" ", 1)
    assert Path(folder).parent == tmp_path and names == "['solution.py']\n"
    assert not Path(folder).exists()


def test_reward_by_name_and_its_limits() -> None:
    score = make_reward(RewardSpec("code", "code", 1.0, {"total_s": 2.0, "run_s": 0.5}))
    began = time.monotonic()
    pairs = [{"input": "", "output": "1"}] * 50
    assert score("p", block("while True: pass"), None, {"tests": pairs}) == 0.0
    assert time.monotonic() - began < 3
