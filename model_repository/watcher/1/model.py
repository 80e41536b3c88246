from python_backend.watcher import WatcherModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
