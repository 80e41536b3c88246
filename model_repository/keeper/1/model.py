from python_backend.keeper import KeeperModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
