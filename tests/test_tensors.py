"""Every `config.pbtxt` says what the code reads and writes; there is one table of tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_request

from python_backend import tensors
from python_backend.tensors import (
    INPUTS,
    INTERNAL_INPUTS,
    INTERNAL_OUTPUTS,
    OUTPUTS,
    TensorSpec,
)
from specserve.batch import Batch, Draft, Row, Verified
from specserve.engines import wire
from specserve.stop_rules import SurvivalRule

model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")

REPOSITORY = Path(tensors.__file__).parents[1] / "model_repository"
MODELS = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))
FRONT = ["ensemble", "specserve", "tensorrt_llm_bls"]
TYPES = {"i": "TYPE_INT32", "u": "TYPE_UINT64", "f": "TYPE_FP32", "O": "TYPE_STRING"}


def load(model: str) -> Any:
    """Parse a model's configuration as Triton does; an unknown field is an error."""
    text = (REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config.ModelConfig())


def described(port: Any) -> tuple[str, str, tuple[int, ...]]:
    return port.name, model_config.DataType.Name(port.data_type), tuple(port.dims)


def expected(spec: TensorSpec) -> tuple[str, str, tuple[int, ...]]:
    return spec.name, f"TYPE_{spec.dtype}", (1, *spec.dims)


def test_the_repository_has_the_models_of_the_design() -> None:
    assert set(MODELS) == {*FRONT, "preprocessing", "watcher", "keeper", "draft", "target"}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_the_name_of_its_folder(model: str) -> None:
    assert load(model).name == model


@pytest.mark.parametrize("model", MODELS)
def test_a_model_repository_holds_no_logic(model: str) -> None:
    source = REPOSITORY / model / "1" / "model.py"
    if load(model).platform == "ensemble":
        assert not source.exists()
        return
    lines = source.read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line and not line.startswith(("#", '"""', "import", "from"))]
    assert code in ([], [line for line in code if "TritonPythonModel" in line])


def test_the_table_names_each_tensor_once() -> None:
    for table in (INPUTS, OUTPUTS):
        names = [spec.name for spec in table]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("model", FRONT)
def test_inputs_are_those_of_the_table(model: str) -> None:
    specs = (*INPUTS, *INTERNAL_INPUTS) if model == "specserve" else INPUTS
    ports = [described(port) for port in load(model).input]
    assert sorted(ports) == sorted(map(expected, specs))


@pytest.mark.parametrize("model", FRONT)
def test_outputs_are_those_of_the_table(model: str) -> None:
    specs = (*OUTPUTS, *INTERNAL_OUTPUTS) if model == "specserve" else OUTPUTS
    assert [described(port) for port in load(model).output] == [expected(s) for s in specs]


@pytest.mark.parametrize("model", FRONT)
def test_everything_is_optional_but_prompt_and_length(model: str) -> None:
    required = {port.name for port in load(model).input if not port.optional}
    assert required <= {"text_input", "max_tokens"}


@pytest.mark.parametrize("model", FRONT)
def test_clients_send_one_request_per_call_with_a_batch_dimension(model: str) -> None:
    config = load(model)
    assert config.max_batch_size == 0
    assert {port.dims[0] for port in (*config.input, *config.output)} == {1}


@pytest.mark.parametrize("model", MODELS)
def test_no_shape_of_an_input_may_be_empty_and_huge(model: str) -> None:
    """[0, 2^62] has no bytes, as it should, and server 2.51's stub died of it."""
    assert all(list(port.dims).count(-1) <= 1 for port in load(model).input)


def test_the_orchestrator_is_decoupled_and_alone() -> None:
    config = load("specserve")
    assert config.model_transaction_policy.decoupled
    assert sum(group.count for group in config.instance_group) == 1


@pytest.mark.parametrize("model", ["draft", "target"])
def test_engine_models_take_a_ragged_step_and_have_one_instance(model: str) -> None:
    config = load(model)
    assert config.max_batch_size == 0
    assert sum(group.count for group in config.instance_group) == 1


# -- ensembles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_an_ensemble_forwards_every_tensor_under_its_name(model: str) -> None:
    config = load(model)
    *_, specserve, watcher = config.ensemble_scheduling.step
    assert (specserve.model_name, watcher.model_name) == ("specserve", "watcher")
    forwarded = dict(specserve.input_map)
    internal = {"input_ids"} if model == "ensemble" else set()
    assert forwarded.pop("watched") == "max_tokens", "what every call has"
    assert set(forwarded) == {spec.name for spec in INPUTS} | internal
    assert all(name == value for name, value in forwarded.items())
    names = {spec.name for spec in OUTPUTS}
    assert {watcher.input_map[name] for name in names} == {specserve.output_map[n] for n in names}
    assert dict(watcher.output_map) == {name: name for name in names}


def test_the_watcher_takes_and_gives_every_output() -> None:
    config = load("watcher")
    assert config.model_transaction_policy.decoupled, "what asks about a client ends there"
    assert [described(port) for port in config.output] == [expected(spec) for spec in OUTPUTS]
    optional = [described(port) for port in config.input if port.optional]
    one_free = [(name, kind, narrowed(dims)) for name, kind, dims in map(expected, OUTPUTS)]
    assert optional == one_free


def narrowed(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Let only the last of several free dimensions be free: an answer has one sequence."""
    return (*(abs(dim) for dim in dims[:-1]), dims[-1])


def test_each_ensemble_step_maps_tensors_that_its_model_has() -> None:
    for model in ("ensemble", "tensorrt_llm_bls"):
        for step in load(model).ensemble_scheduling.step:
            config = load(step.model_name)
            assert set(step.input_map) <= {port.name for port in config.input}
            assert set(step.output_map) <= {port.name for port in config.output}
            required = {port.name for port in config.input if not port.optional}
            assert required <= set(step.input_map)


# -- engine models -----------------------------------------------------------------------------


def check_ports(arrays: dict[str, np.ndarray], ports: Any, optional: set[str]) -> None:
    """Assert that arrays fit the ports: names, types, shapes."""
    declared = {port.name: port for port in ports}
    assert set(arrays) | optional == set(declared)
    for name, array in arrays.items():
        _, kind, dims = described(declared[name])
        assert kind == TYPES[array.dtype.kind], name
        assert len(dims) == array.ndim, name
        assert all(d in (-1, n) for d, n in zip(dims, array.shape, strict=True)), name


def make_rows() -> list[Row]:
    sampling = make_request(temperature=0.5, bad_words=((1, 2),)).sampling
    row = Row(1, 4, [5], True, [0, 1], 3, sampling, 2, 3, [4, 5])
    return [row, Row(2, 0, [5, 6], False, [2], 9)]


def test_draft_model_takes_what_the_wire_sends() -> None:
    config = load("draft")
    rule = SurvivalRule(np.array([0.5, 1.0]), np.array([0.3]))
    row = replace(make_rows()[0], is_draft_sampled=True)
    arrays = wire.encode_draft_request([row], rule, released=[9])
    check_ports(arrays, config.input, optional=set())
    assert {port.name for port in config.input if port.optional} == {
        "stop_rule", "seeds", "sampling", "released",
    }  # fmt: skip
    answers = wire.encode_drafts([Draft([1, 2], [0.5, 0.5])])
    check_ports(answers, config.output, optional={"engine_s"})


def test_target_model_takes_what_the_wire_sends() -> None:
    config = load("target")
    arrays = wire.encode_verify_request(Batch(make_rows()), [[7], []], {1, 2}, [9])
    check_ports(arrays, config.input, optional=set())
    assert {p.name for p in config.input if p.optional} == {"new_requests", "released"}
    answers = wire.encode_verified([Verified([7, 8], [-0.1, -0.2]), Verified()])
    check_ports(answers, config.output, optional={"engine_s"})


def test_empty_steps_keep_the_declared_types() -> None:
    """Guards against numpy's float64 for an empty list, which Triton would refuse."""
    verified = wire.encode_verified([Verified()])
    drafts = wire.encode_drafts([Draft()])
    for array in (*verified.values(), *drafts.values()):
        assert TYPES[array.dtype.kind] in ("TYPE_INT32", "TYPE_FP32")
        assert array.dtype.itemsize == 4
