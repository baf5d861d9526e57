"""A Triton model of ours is told its place and parameters, and a wrong one is refused by name."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from sun.settings import Place, check_numpy


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    size: int = 3
    ratio: float = 0.5
    name: str = "a"


def place(instance: dict[str, str] = {}, groups: list[dict] = [], **parameters: str) -> Place:
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}, "instance_group": groups}
    return Place({
        "model_name": "decode_0", "model_repository": "/srv/models/decode_0", "model_version": "1", "model_config": json.dumps(config), **instance})


def test_a_model_knows_where_it_lies():
    it = place()
    assert (it.name, str(it.repository), str(it.version_dir)) == ("decode_0", "/srv/models", "/srv/models/decode_0/1")


def test_parameters_are_read_from_their_strings():
    assert place(size="7", ratio="2", name="5").settings(Settings) == Settings(7, 2.0, "5")
    assert place().settings(Settings) == Settings()


def test_tritons_own_parameters_are_left_to_triton():
    assert place(EXECUTION_ENV_PATH="/env.tar.gz").settings(Settings) == Settings()


@pytest.mark.parametrize(("parameters", "name"), [({"size": "many"}, "size"), ({"sise": "3"}, "sise"), ({"ratio": ""}, "ratio")])
def test_a_bad_parameter_is_refused_by_name_with_those_there_are(parameters, name):
    with pytest.raises(ValueError, match=rf"config\.pbtxt of decode_0: parameters: .*{name}.*known are size, ratio, name"):
        place(**parameters).settings(Settings)


def test_a_folder_may_be_absolute_or_from_the_repositorys_parent_and_is_refused_by_parameter_if_missing(tmp_path):
    (tmp_path / "own").mkdir()
    it = place()
    it.repository = tmp_path / "models"
    assert it.folder("weights", "") is None
    assert it.folder("weights", "own") == it.folder("weights", str(tmp_path / "own")) == tmp_path / "own"
    with pytest.raises(ValueError, match=r"config\.pbtxt of decode_0: parameters: weights is 'gone'"):
        it.folder("weights", "gone")


@pytest.mark.parametrize("version", ["2.0.0", "2.1.3", "10.0"])
def test_numpy_that_corrupts_tensors_is_refused(version):
    with pytest.raises(RuntimeError, match="numpy<2"):
        check_numpy(version)


def test_this_environments_numpy_is_fine():
    check_numpy()
    check_numpy("1.26.4")
    assert np.__version__.startswith("1.")


GPU = {"model_instance_kind": "GPU", "model_instance_device_id": "3"}


def test_an_executor_runs_where_triton_placed_the_instance():
    assert place(GPU).device("cuda") == place(GPU).device("tensorrt") == "cuda:3"
    assert place({"model_instance_kind": "CPU", "model_instance_device_id": "0"}).device("cpu") is None


@pytest.mark.parametrize(("instance", "executor", "needed"), [({}, "cuda", "KIND_GPU"), (GPU, "cpu", "KIND_CPU")])
def test_an_executor_of_the_other_kind_is_refused(instance, executor, needed):
    with pytest.raises(ValueError, match=f"decode_0: parameters: executor is '{executor}', which needs instance_group kind {needed}"):
        place(instance).device(executor)


@pytest.mark.parametrize("groups", [[], [{"kind": "KIND_CPU", "count": 1, "gpus": []}], [{"kind": "KIND_GPU", "count": 1, "gpus": [3]}]])
def test_one_instance_is_one(groups):
    place(groups=groups).only_one("there is one name")


@pytest.mark.parametrize(("groups", "words"), [
    ([{"kind": "KIND_CPU", "count": 2}], "count: 2"), ([{"kind": "KIND_GPU", "count": 2, "gpus": [0]}], "count: 2"),
    ([{"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]}], "gpus: 2"), ([{"kind": "KIND_GPU", "count": 1, "gpus": []}], "gpus: 0"),
    ([{"kind": "KIND_GPU", "count": 1, "gpus": [0]}, {"kind": "KIND_GPU", "count": 1, "gpus": [1]}], "groups: 2")])
def test_several_instances_of_one_name_are_refused_by_field(groups, words):
    with pytest.raises(ValueError, match=rf"config\.pbtxt of decode_0: instance_group: {words}, must be 1: there is one name"):
        place(groups=groups).only_one("there is one name")
