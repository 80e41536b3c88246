"""The launcher: what it checks, what it makes, and that a real server leaves nothing behind."""

import contextlib
import http.client
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specserve.launch import prerequisites
from specserve.launch.backend_dir import make_backend_dir
from specserve.launch.calls import example_calls
from specserve.launch.environment import server_environment
from specserve.launch.installation import (
    ContainerInstallation,
    TritonInstallation,
    find_installation,
    find_libpython,
    libpython_name,
)
from specserve.launch.log_tail import LogTail
from specserve.launch.marked_processes import MarkedProcesses
from specserve.launch.serve import ServeOptions, serve
from specserve.launch.server_log import ServerLog
from specserve.launch.stop_signal import StopSignal
from specserve.launch.triton_options import TritonOptions
from specserve.launch.triton_process import TritonProcess, TritonStartError, model_of

LOOPBACK = "127.0.0.1"

CONFIG = """
name: "{name}" backend: "python" max_batch_size: 8
input [ {{ name: "X" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "Y" data_type: TYPE_STRING dims: [ 1 ] }} ]
"""

ECHO_MODEL = """
import os, sys, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0, 0].decode()
        if text == "slow":
            time.sleep(1.0)
        answer = f"{text} {sys.prefix} {os.environ.get('SPECSERVE_CONFIG')}"
        data = np.array([[answer]], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("Y", data)])
"""

BROKEN_MODEL = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("the engine is for another target")

    def execute(self, requests):
        pass
"""

SERVE_SCRIPT = """
import sys
from pathlib import Path
from specserve.launch.serve import ServeOptions, serve
repository, config, *ports = sys.argv[1:]
http, grpc, metrics = map(int, ports)
sys.exit(serve(ServeOptions(
    model_repository=Path(repository), engine_dir=Path(repository), config_path=Path(config),
    http_port=http, grpc_port=grpc, metrics_port=metrics, drain_timeout_s=10.0,
)))
"""


@pytest.fixture
def installation() -> TritonInstallation:
    found = find_installation()
    if found is None:
        pytest.skip("nvidia-pytriton is not installed")
    return found


@pytest.fixture
def ports() -> tuple[int, int, int]:
    """Three ports of this machine that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        http_port, grpc_port, metrics_port = (one.getsockname()[1] for one in sockets)
    return http_port, grpc_port, metrics_port


@pytest.fixture
def add_model(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a model into a repository of this test and return the repository."""
    repository = tmp_path / "models"

    def add(name: str, code: str) -> Path:
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name))
        (repository / name / "1" / "model.py").write_text(code)
        return repository

    return add


def options_for(repository: Path, ports: tuple[int, int, int]) -> TritonOptions:
    http_port, grpc_port, metrics_port = ports
    return TritonOptions(repository, http_port, grpc_port, metrics_port, exit_timeout_s=10.0)


def infer(http_port: int, model: str, text: str) -> str:
    tensor = {"name": "X", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    with contextlib.closing(http.client.HTTPConnection(LOOPBACK, http_port, timeout=20)) as client:
        client.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}))
        answer = json.load(client.getresponse())
    return str(answer["outputs"][0]["data"][0])


# --- prerequisites ---


@pytest.mark.parametrize(
    ("system", "glibc", "words"),
    [
        ("Linux", "2.35", None),
        ("Linux", "2.36", None),
        ("Linux", "2.31", "glibc 2.31 is too old"),
        ("Linux", None, "no glibc"),
        ("Darwin", None, "Darwin is not supported"),
    ],
)
def test_platform_needs_a_recent_glibc(system: str, glibc: str | None, words: str | None) -> None:
    expect(prerequisites.check_platform(system, glibc), words)


@pytest.mark.parametrize(
    ("machine", "flags", "words"),
    [
        ("x86_64", "sse4_2 avx avx2 fma", None),
        ("x86_64", "sse4_2 avx", "no AVX2"),
        ("aarch64", "neon", None),
    ],
)
def test_cpu_needs_avx2(tmp_path: Path, machine: str, flags: str, words: str | None) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    expect(prerequisites.check_cpu(machine, cpuinfo), words)


def test_missing_pytriton_is_named() -> None:
    expect(prerequisites.check_pytriton(None), "pip install '.[serve]'")


def test_python_without_a_stub_is_named(tmp_path: Path) -> None:
    installation = TritonInstallation(tmp_path)
    expect(prerequisites.check_stub(installation, (3, 14)), "no stub for Python 3.14")
    installation.stub((3, 12)).parent.mkdir(parents=True)
    installation.stub((3, 12)).touch()
    expect(prerequisites.check_stub(installation, (3, 12)), None)


def test_a_container_without_its_stub_is_named(tmp_path: Path) -> None:
    problem = prerequisites.check_stub(ContainerInstallation(tmp_path), (3, 12))
    expect(problem, f"{tmp_path}/backends/python has no stub")


def test_missing_libpython_says_how_to_get_it(tmp_path: Path) -> None:
    problem = prerequisites.check_libpython(find_libpython([tmp_path]))
    expect(problem, libpython_name())
    assert problem is not None
    assert all(word in problem for word in ("apt-get", "pyenv", "conda"))
    (tmp_path / libpython_name()).touch()
    expect(prerequisites.check_libpython(find_libpython([tmp_path])), None)


@pytest.mark.parametrize(
    ("version", "words"), [("1.26.4", None), ("2.1.0", "numpy 2.1.0"), (None, "numpy is missing")]
)
def test_numpy_must_be_older_than_2(version: str | None, words: str | None) -> None:
    expect(prerequisites.check_numpy(version), words)


def test_address_must_be_ipv4() -> None:
    expect(prerequisites.check_address("0.0.0.0"), None)
    expect(prerequisites.check_address("localhost"), "ADDRESS=127.0.0.1")


def test_taken_port_names_the_variable_to_set() -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        problem = prerequisites.check_port("grpc", LOOPBACK, port)
        expect(problem, f"grpc port {port} on {LOOPBACK} cannot be used")
        expect(problem, "GRPC_PORT (--grpc-port)")
    expect(prerequisites.check_port("grpc", LOOPBACK, port), None)


def test_ports_must_exist_and_differ() -> None:
    expect(prerequisites.check_port("http", LOOPBACK, 70000), "not between 1 and 65535")
    expect(prerequisites.check_distinct({"http": 8000, "grpc": 8000}), "GRPC_PORT=8000")
    expect(prerequisites.check_distinct({"http": 8000, "grpc": 8001}), None)


def test_too_little_shared_memory_is_named(tmp_path: Path) -> None:
    expect(prerequisites.check_shared_memory(tmp_path, min_bytes=1), None)
    expect(prerequisites.check_shared_memory(tmp_path, min_bytes=2**60), "--shm-size")


def test_missing_folders_are_named(tmp_path: Path, add_model: Callable[[str, str], Path]) -> None:
    expect(prerequisites.check_model_repository(tmp_path / "none"), "--model-repository")
    expect(prerequisites.check_model_repository(add_model("echo", ECHO_MODEL)), None)
    expect(prerequisites.check_engine_dir(tmp_path / "none"), "--engine-dir")
    expect(prerequisites.check_engine_dir(tmp_path), None)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    ports = {"http": 0, "grpc": 0}
    problems = prerequisites.find_problems("here", ports, tmp_path / "none", tmp_path / "none")
    words = ["address", "http port", "grpc port", "own", "no model", "no engines"]
    for word in words:
        assert sum(word in problem for problem in problems) == 1, (word, problems)
    assert not any("\n" in problem for problem in problems)


def test_serve_refuses_with_every_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ServeOptions(tmp_path / "none", tmp_path / "none", address="nowhere")
    assert serve(options) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(word in shown.err for word in ("nowhere", "no model", "no engines"))


def expect(problem: str | None, words: str | None) -> None:
    if words is None:
        assert problem is None
    else:
        assert problem is not None
        assert words in problem


# --- what the launcher makes and reads ---


def test_backend_dir_holds_the_stub_of_this_python(
    tmp_path: Path, installation: TritonInstallation
) -> None:
    python = make_backend_dir(installation, tmp_path) / "python"
    names = {path.name for path in python.iterdir()}
    assert names == {
        "libtriton_python.so",
        "triton_python_backend_utils.py",
        "triton_python_backend_stub",
    }
    stub = python / "triton_python_backend_stub"
    assert stub.resolve() == installation.stub().resolve()
    assert os.access(stub, os.X_OK)


def test_missing_stub_stops_before_the_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_backend_dir(TritonInstallation(tmp_path / "empty"), tmp_path)


def test_environment_puts_this_python_first() -> None:
    base = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/opt/lib", "KEPT": "1"}
    environment = server_environment(TritonInstallation(Path("/site")), base, {"ADDED": "2"})
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert environment["LD_LIBRARY_PATH"].endswith("/site/nvidia_pytriton.libs:/opt/lib")
    assert (environment["KEPT"], environment["ADDED"]) == ("1", "2")


@pytest.mark.parametrize("theirs", ["", "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=2"])
def test_malloc_is_asked_for_huge_pages_and_who_runs_the_server_may_say_otherwise(
    theirs: str,
) -> None:
    """Of a tunable that is set twice glibc takes the last value."""
    base = {"GLIBC_TUNABLES": theirs} if theirs else {}
    environment = server_environment(TritonInstallation(Path("/site")), base, {})
    expected = ":".join(["glibc.malloc.hugetlb=1", *([theirs] if theirs else [])])
    assert environment["GLIBC_TUNABLES"] == expected


def test_command_listens_on_loopback_only() -> None:
    options = TritonOptions(Path("/models"), extra_args=("--id=last",))
    command = options.command(TritonInstallation(Path("/site")), Path("/run"), "prefix-")
    addresses = [argument for argument in command if "-address=" in argument]
    assert addresses == [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    assert "--backend-config=python,shm-region-prefix-name=prefix-" in command
    assert command[-1] == "--id=last"


def test_log_explains_a_failure_without_the_noise(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "log")
    assert log.errors() == []
    log.path.write_text(
        'E0101 10:00:00.000000 7 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        'I0101 10:00:00.000000 7 model_lifecycle.cc:472] "loading: a:1"\n'
        "| Model | Version |\n"
        "Segmentation fault\n"
        'E0101 10:00:01.000000 7 server.cc:9] "Socket in use"\n'
    )
    assert log.cause() == "Socket in use\nlast lines of its log:\nSegmentation fault"
    with log.path.open("a") as file:
        file.write(
            "E0101 10:00:02.000000 7 model_lifecycle.cc:642] \"failed to load 'a' version 1: "
            'Internal: ValueError: no engine\\n\\nAt:\\n  model.py(2): initialize\\n"\n'
        )
    failure = "failed to load 'a' version 1: Internal: ValueError: no engine\n\nAt:\n  model.py(2)"
    assert log.cause() == f"{failure}: initialize"


def test_log_goes_to_the_stream_and_the_file_stays_small(tmp_path: Path) -> None:
    stream, path, text = io.StringIO(), tmp_path / "log", "größer\n" * 100
    with LogTail(path, stream, max_bytes=512), path.open("a") as file:
        for count in (1, 2, 3):
            file.write(text)
            file.flush()
            wait_until(lambda count=count: stream.getvalue() == text * count)
            assert path.stat().st_size == 0
        file.write("the end")
    assert stream.getvalue() == text * 3 + "the end"


def test_example_calls_reach_a_server_on_all_addresses() -> None:
    calls = example_calls("0.0.0.0", 18000, 18001)
    assert "http://127.0.0.1:18000/v2/models/ensemble/generate_stream" in calls
    assert '"127.0.0.1:18001"' in calls
    prompt = r'"text_input": "import unittest\n\nclass Test"'
    assert f'{{{prompt}, "max_tokens": 40, "stream": true}}' in calls
    script = calls.split("<<'EOF'\n")[1].split("EOF\n")[0]
    compile(script, "call", "exec")


def test_two_signals_at_once_are_one_request() -> None:
    with StopSignal() as stop:
        assert not stop.wait(0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5.0)
        assert not stop.insistent


def test_marked_processes_are_killed_in_any_session() -> None:
    ours, other = MarkedProcesses("LAUNCH_TEST", "ours"), MarkedProcesses("LAUNCH_TEST", "other")
    processes = [
        subprocess.Popen(
            ["sleep", "60"], env={**os.environ, "LAUNCH_TEST": value}, start_new_session=True
        )
        for value in ("ours", "other")
    ]
    try:
        assert ours.pids() == [processes[0].pid]
        assert ours.kill() == []
        assert processes[0].wait(5) == -signal.SIGKILL
        assert other.holds(processes[1].pid)
    finally:
        other.kill()
        for process in processes:
            process.wait(5)


# --- a real server ---


@pytest.fixture
def start(
    tmp_path: Path, installation: TritonInstallation, ports: tuple[int, int, int]
) -> Iterator[Callable[[Path], TritonProcess]]:
    """Start a server on a repository; whatever the test does, it is stopped in the end."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with contextlib.ExitStack() as stack:
        yield lambda repository: stack.enter_context(
            TritonProcess(options_for(repository, ports), run_dir, installation)
        )


@pytest.mark.triton
def test_server_answers_and_leaves_nothing(
    start: Callable[[Path], TritonProcess], add_model: Callable[[str, str], Path]
) -> None:
    server = start(add_model("echo", ECHO_MODEL))
    assert 0.0 < server.wait_until_ready(30.0) < 30.0
    text, prefix, _ = infer(server.options.http_port, "echo", "hello").split(" ")
    assert (text, prefix) == ("hello", sys.prefix)
    assert len(server.pids()) == 2
    assert len(server.shared_memory()) == 1
    assert server.poll() is None

    server.stop()
    assert server.poll() == 0
    assert server.pids() == []
    assert server.shared_memory() == []
    assert [path.name for path in server.run_dir.iterdir()] == ["tritonserver.log"]


@pytest.mark.triton
def test_server_laid_out_as_in_nvidias_container_answers(
    tmp_path: Path,
    installation: TritonInstallation,
    ports: tuple[int, int, int],
    add_model: Callable[[str, str], Path],
) -> None:
    """The embedded server's files, where that image has its own: /opt/tritonserver."""
    folder = tmp_path / "tritonserver"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "tritonserver").symlink_to(installation.binary)
    (folder / "lib").symlink_to(installation.libraries)
    (folder / "backends").mkdir()
    shutil.copytree(installation.python_backend, folder / "backends" / "python")
    shutil.copy(installation.stub(), folder / "backends" / "python")
    container = find_installation(folder)
    assert isinstance(container, ContainerInstallation)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    options = options_for(add_model("echo", ECHO_MODEL), ports)
    with TritonProcess(options, run_dir, container) as server:
        server.wait_until_ready(30.0)
        assert infer(options.http_port, "echo", "hello").startswith("hello ")


@pytest.mark.triton
def test_model_that_does_not_load_shows_its_error(
    start: Callable[[Path], TritonProcess], add_model: Callable[[str, str], Path]
) -> None:
    add_model("echo", ECHO_MODEL)
    server = start(add_model("broken", BROKEN_MODEL))
    with pytest.raises(TritonStartError, match=r"'broken'.*the engine is for another target"):
        server.wait_until_ready(30.0)
    server.stop()
    assert server.pids() == []
    assert server.shared_memory() == []


@pytest.mark.parametrize(
    ("command", "model"),
    [
        (["/b/triton_python_backend_stub", "/m/echo/1/model.py", "prefix"], "echo"),
        (["/b/triton_python_backend_stub"], None),  # as it may look while it starts or ends
        (["/b/triton_python_backend_stub", "/m"], None),
        (["/b/tritonserver", "--model-repository=/m"], None),
        ([], None),
    ],
)
def test_half_a_command_line_is_no_model(command: list[str], model: str | None) -> None:
    assert model_of(command) == model


@pytest.mark.triton
def test_dead_model_is_noticed_and_does_not_hold_up_the_stop(
    start: Callable[[Path], TritonProcess], add_model: Callable[[str, str], Path]
) -> None:
    """Triton alone would wait for its exit timeout, 10 s here, and keep the ports meanwhile."""
    server = start(add_model("echo", ECHO_MODEL))
    server.wait_until_ready(30.0)
    assert server.dead_models() == []
    (stub,) = set(server.pids()) - {min(server.pids())}
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: server.dead_models() == ["echo"])
    started_s = time.monotonic()
    server.stop()
    assert time.monotonic() - started_s < 6.0
    assert server.pids() == []
    assert server.shared_memory() == []


@pytest.mark.triton
def test_open_connection_does_not_hold_up_the_stop_once_nothing_is_in_flight(
    start: Callable[[Path], TritonProcess], add_model: Callable[[str, str], Path]
) -> None:
    """Triton alone would wait for its exit timeout: its client may have gone, or be idle."""
    server = start(add_model("echo", ECHO_MODEL))
    server.wait_until_ready(30.0)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.options.http_port)) as c:
        c.request("GET", "/v2/health/ready")
        c.getresponse().read()
        started_s = time.monotonic()
        server.stop(is_busy=lambda: False)
        assert time.monotonic() - started_s < 11.0
    assert server.pids() == []


@pytest.mark.triton
def test_interrupted_serve_drains_and_leaves_nothing(
    tmp_path: Path,
    installation: TritonInstallation,
    ports: tuple[int, int, int],
    add_model: Callable[[str, str], Path],
) -> None:
    config = tmp_path / "config.json"
    arguments = [str(add_model("echo", ECHO_MODEL)), str(config), *map(str, ports)]
    launcher = subprocess.Popen(
        [sys.executable, "-c", SERVE_SCRIPT, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        shown = read_until(launcher, "Ctrl-C stops it.")
        assert "Ready." in shown
        server_id = server_id_of(launcher.pid)
        assert infer(ports[0], "echo", "hello").endswith(f" {config}")
        request = start_request(ports[0], "slow")
        launcher.send_signal(signal.SIGINT)
        assert json.load(request.getresponse())["outputs"][0]["data"][0].startswith("slow")
        request.close()  # NOTE: Triton waits for open HTTP connections too, idle ones included
        shown += launcher.communicate(timeout=20)[0]
    finally:
        launcher.kill()  # the server would follow; after a normal end this does nothing
        launcher.wait()
    assert launcher.returncode == 0
    assert shown.rstrip().endswith("Stopped.")
    assert MarkedProcesses("SPECSERVE_SERVER_ID", server_id).pids() == []
    assert list(Path("/dev/shm").glob(f"{server_id}*")) == []
    run_dir = Path(shown.split("log: ")[1].splitlines()[0]).parent
    assert not run_dir.exists()


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def read_until(process: "subprocess.Popen[str]", words: str, timeout_s: float = 30.0) -> str:
    """Read what a process prints until `words` appear; fail if it ends or time runs out."""
    assert process.stdout is not None
    shown, deadline = "", time.monotonic() + timeout_s
    while words not in shown:
        readable, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        assert readable, f"no {words!r} in time: {shown}"
        line = os.read(process.stdout.fileno(), 65536).decode()
        assert line, f"ended: {shown}"
        shown += line
    return shown


def server_id_of(launcher_pid: int) -> str:
    """Read the mark of the server that a launcher started from that server's environment."""
    children = Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split()
    environment = Path(f"/proc/{children[0]}/environ").read_text().split("\0")
    return next(
        entry.partition("=")[2] for entry in environment if entry.startswith("SPECSERVE_SERVER_ID=")
    )


def start_request(http_port: int, text: str) -> http.client.HTTPConnection:
    """Send a request to the echo model and return the connection that will hold the answer."""
    tensor = {"name": "X", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    client = http.client.HTTPConnection(LOOPBACK, http_port, timeout=20)
    client.request("POST", "/v2/models/echo/infer", json.dumps({"inputs": [tensor]}))
    return client
