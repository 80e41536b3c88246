from python_backend.engine_model import DraftModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
