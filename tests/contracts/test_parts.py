"""What common/parts relies on in how Flower puts a message together, pinned. A change here says what broke."""

import inspect
import json

from flwr.app import Array
from flwr.app.message.array import Array as MadeBy
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry, pull_objects

from common import parts


def test_an_array_is_joined_as_its_list_says() -> None:
    """The reason for check_parts, and the way it reads the list."""
    array = Array("uint8", (4,), "x", b"data")
    content = {name: part.deflate() for name, part in get_all_nested_objects(array).items()}
    (chunk,) = (name for name, part in content.items() if parts._is_chunk(part))
    assert parts._is_array(content[array.object_id])
    assert parts._listed(content[array.object_id]) == [chunk]
    assert json.loads(get_object_body(content[array.object_id], Array))["arraychunk_ids"] == [0]
    source = inspect.getsource(MadeBy.inflate)
    assert "chunk_ids = [children_ids[i] for i in chunk_ids_indices]" in source
    assert "children_ids = get_object_children_ids_from_object_content(object_content)" in source


def test_a_chunk_begins_with_its_name_and_has_no_children() -> None:
    content = ArrayChunk(memoryview(b"data")).deflate()
    assert content == b"ArrayChunk  4\0data"
    assert get_object_head_values_from_object_content(content) == ("ArrayChunk", [], 4)
    assert get_object_type_from_object_content(content) == "ArrayChunk"


def test_nothing_else_joins_its_children() -> None:
    """A new kind of part may take more memory than its bytes: look at its `inflate`."""
    assert set(inflatable_class_registry) == {
        *("ArrayChunk", "Array", "ArrayRecord", "ConfigRecord", "Message", "MetricRecord", "RecordDict"),
    }
    source = inspect.getsource(inflatable_utils.inflate_object_from_contents)
    assert "if object_id in objects:" in source  # each is made once, however often it is named


def test_honest_chunks_are_larger_than_what_is_counted_with() -> None:
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE >= 2 * parts._CHUNK_BYTES


def test_pull_takes_a_time_tries_and_pauses() -> None:
    assert {"max_time", "max_tries_per_object", "initial_backoff", "backoff_cap"} <= set(
        inspect.signature(pull_objects).parameters
    )
