from python_backend.engine_model import TargetModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
