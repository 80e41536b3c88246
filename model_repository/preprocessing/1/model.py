from python_backend.preprocessing import PreprocessingModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
