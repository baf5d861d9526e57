"""A parameter in config.pbtxt is read and replaced however people write it, and all else stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_build.config_file import parameter, set_parameter

AROUND = '# mine\nbackend: "sun_decode"\nparameters { key: "threads" value { string_value: "2" } }\n'
FORMS = [
    'parameters { key: "weights" value { string_value: "old" } }\n', 'parameters: { key: "weights", value: { string_value: "old" } }\n',
    'parameters: {\n  key: "weights"\n  value: {\n    string_value: "o\\"l\\\\d"\n  }\n}\n', "",
]


@pytest.fixture
def config(tmp_path):
    """The file of a model `decode_0`."""
    (tmp_path / "decode_0").mkdir()
    return tmp_path / "decode_0" / "config.pbtxt"


def read(config, name: str) -> str:
    return parameter(config.parent.parent, config.parent.name, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", ["new", "", '/a "folder"\\of mine', "ein Wörterbuch"])
def test_it_is_replaced_or_taken_away_whatever_its_form(config, form, value):
    config.write_text(AROUND + form)
    set_parameter(config, "weights", value)
    assert read(config, "weights") == value and read(config, "threads") == "2"
    assert config.read_text().startswith("# mine\n") and config.read_text().count('"weights"') == bool(value)


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_value_is_read_as_it_was_written(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.pbtxt").write_text(AROUND)
    for _ in range(2):
        set_parameter(folder / "config.pbtxt", "weights", value)
    assert parameter(folder.parent, folder.name, "weights") == value


@pytest.mark.parametrize(("text", "said"), [
    (AROUND + 'parameters [{ key: "weights" value { string_value: "old" } }]\n', "weights is written in a form"), ('backend "x\n', "1:"),
])
def test_what_is_not_understood_is_refused_and_left_alone(config, text, said):
    config.write_text(text)
    with pytest.raises(ValueError, match=f"config.pbtxt: .*{said}"):
        set_parameter(config, "weights", "")
    assert config.read_text() == text
