from python_backend.orchestrator import OrchestratorModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
