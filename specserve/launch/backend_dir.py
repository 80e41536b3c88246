"""A private Triton backend folder whose Python backend runs the Python that started us.

pytriton ships one stub per Python version, apart from the backend, and expects the right one to
be put beside it. Doing that inside site-packages would change what other programs see.
"""

from pathlib import Path

from specserve.launch.installation import TritonInstallation

BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")


def make_backend_dir(installation: TritonInstallation, run_dir: Path) -> Path:
    """Link the Python backend and its stub into `run_dir` and return the folder for Triton.

    Links rather than copies: a run directory on a filesystem mounted noexec works too. The caller
    removes the folder.

    Raises:
        FileNotFoundError: if a file of the installation is missing.
        FileExistsError: if the folder was made before.
    """
    backend_dir = run_dir / "backends"
    python_dir = backend_dir / "python"
    python_dir.mkdir(parents=True)
    sources = [installation.python_backend / name for name in BACKEND_FILES]
    for source in [*sources, installation.stub()]:
        (python_dir / source.name).symlink_to(source.resolve(strict=True))
    return backend_dir
