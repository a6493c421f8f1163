"""Mutations of valid files: of bytes, of JSON, and of containers whose check sums are renewed."""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

# Numbers around which code that reads sizes goes wrong.
_NUMBERS = (-1, 0, 1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**400)
_VALUES: tuple[Any, ...] = (
    None, True, False, *_NUMBERS, 0.5, -1e308, math.nan, math.inf, "", "x", "\ud800", "0" * 5000,
    "../../x", "/", "float16", "complex64", "int4", "ternary", [], {}, [[]], [0, 2**62], {"": 0},
)  # fmt: skip
_DEEP = 200  # levels of a nested value; enough to show that depth is bounded
_WITHIN = 5  # levels in which values are edited, or copies of deep ones would be ever deeper
_PNG_HEAD = 8  # bytes before the first chunk
_FRAMES = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")  # segments of JPEG with the image's size


def damage(data: bytes, rng: Rng) -> bytes:
    """Flips, overwrites, cuts, repeats or moves a few bytes, one to three times."""
    for _ in range(rng.integers(1, 4)):
        start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        if rng.random() < 0.5:  # most of what happens to a file is small
            stop = min(stop, start + int(rng.integers(1, 9)))
        head, part, tail = data[:start], data[start:stop], data[stop:]
        match rng.integers(8):
            case 0:
                data = data[:start]
            case 1:
                data = head + tail
            case 2:
                data = head + part + part + tail
            case 3:
                data = head + bytes(len(part)) + tail
            case 4:
                data = head + rng.bytes(min(len(part), 64)) + part[64:] + tail
            case 5:
                data = tail + head + part
            case _:
                data = _flipped(data, rng)
    return data


def _flipped(data: bytes, rng: Rng) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def edit_json(value: Any, rng: Rng) -> Any:
    """Returns a JSON value with one to three of its parts replaced, removed or renamed."""
    value = _copied(value)
    for _ in range(rng.integers(1, 4)):
        places = [(None, None), *_places(value)]
        parent, key = places[rng.integers(len(places))]
        if parent is None:
            if rng.random() < 0.05:  # or nearly all edits of a small object would replace it
                value = _strange(rng)
        elif (kind := rng.integers(4)) == 0:
            del parent[key]
        elif kind == 1:
            other, name = places[rng.integers(len(places))]
            parent[key] = _copied(value if other is None else other[name])
        elif kind == 2 and isinstance(parent, dict):
            parent[_strange_name(key, rng)] = parent.pop(key)
        else:
            parent[key] = _strange(rng)
    return value


def _copied(value: Any) -> Any:
    """Not by `copy.deepcopy`, which takes two frames a level."""
    return json.loads(json.dumps(value))


def _places(value: Any, within: int = _WITHIN) -> list[tuple[Any, Any]]:
    """Where the parts of a value are: their containers and keys."""
    if not within:
        return []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    else:
        return []
    below = [place for _, part in inside for place in _places(part, within - 1)]
    return [(value, key) for key, _ in inside] + below


def _strange(rng: Rng) -> Any:
    if rng.random() < 0.03:
        return json.loads("[" * _DEEP + "]" * _DEEP)
    return _copied(_VALUES[rng.integers(len(_VALUES))])  # which may be edited next


def _strange_name(name: str, rng: Rng) -> str:
    names = ("", "/", "../x", name + "/x", "/".join("a" * _DEEP), name.upper(), "\x00", "~2", "__")
    return names[rng.integers(len(names))]


def edit_safetensors(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """Returns a container whose header is another, of the right length."""
    length = int.from_bytes(data[:8], "little")
    header = edit(json.loads(data[8 : 8 + length]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def edit_png(data: bytes, rng: Rng) -> bytes:
    """Returns a PNG file with a chunk changed, removed, repeated or moved; check sums are right."""
    chunks, start = [], _PNG_HEAD
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        chunks.append((data[start + 4 : start + 8], data[start + 8 : start + 8 + size]))
        start += size + 12
    chosen, other = rng.integers(0, len(chunks), 2)
    kind, content = chunks[chosen]
    match rng.integers(6):
        case 0:
            del chunks[chosen]
        case 1:
            chunks.insert(other, (kind, content))
        case 2:
            chunks[chosen] = kind, damage(content, rng)
        case 3:
            chunks[chosen] = rng.choice([b"IHDR", b"IDAT", b"PLTE", b"zTXt", b"iCCP"]), content
        case _:
            chunks[0] = chunks[0][0], _other_size(chunks[0][1], rng, offset=0, width=4)
    return data[:_PNG_HEAD] + b"".join(
        len(content).to_bytes(4, "big")
        + bytes(kind)
        + content
        + zlib.crc32(bytes(kind) + content).to_bytes(4, "big")
        for kind, content in chunks
    )


def edit_jpeg(data: bytes, rng: Rng) -> bytes:
    """Returns a JPEG file with a segment changed, removed, repeated or moved."""
    starts = [0]
    while data[starts[-1] : starts[-1] + 2] != b"\xff\xda":
        start = starts[-1]
        size = 2 if start == 0 else 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        starts.append(start + size)
    stops = [*starts[1:], len(data)]
    segments = [data[start:stop] for start, stop in zip(starts, stops, strict=True)]
    chosen, other = rng.integers(1, len(segments), 2)
    match rng.integers(5):
        case 0:
            del segments[chosen]
        case 1:
            segments.insert(other, segments[chosen])
        case 2:
            segments[chosen] = segments[chosen][:4] + damage(segments[chosen][4:], rng)
        case _:
            index = next(i for i, part in enumerate(segments) if part[:2] in _FRAMES)
            segments[index] = _other_size(segments[index], rng, offset=5, width=2)
    return b"".join(segments)


def _other_size(content: bytes, rng: Rng, offset: int, width: int) -> bytes:
    """Puts another number for the height or for the width, which lie one after the other."""
    place = offset + width * int(rng.integers(2))
    number = (0, 1, 2, 200, 3000, 13_000, 60_000, 2 ** (8 * width) - 1)[rng.integers(8)]
    return content[:place] + number.to_bytes(width, "big") + content[place + width :]


def edit_archive(data: bytes, rng: Rng) -> bytes:
    """Returns a zip archive with a file changed, removed, renamed, swapped, or all compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    names = sorted(files)
    chosen, other = (names[i] for i in rng.integers(0, len(names), 2))
    pickle = next(name for name in names if name.endswith("data.pkl"))
    compression = zipfile.ZIP_STORED
    match rng.integers(8):
        case 0:
            del files[chosen]
        case 1:
            files[chosen], files[other] = files[other], files[chosen]
        case 2:
            files[chosen] = damage(files[chosen], rng)
        case 3:
            compression = zipfile.ZIP_DEFLATED
        case 4:
            files[other + "x"] = files.pop(chosen)
        case 5:
            files[pickle] = damage(files[pickle], rng)
        case _:
            files[pickle] = edit_pickle(files[pickle], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def edit_pickle(data: bytes, rng: Rng) -> bytes:
    """Returns a pickle with one of its short numbers or names replaced."""
    if rng.random() < 0.3:
        names = (b"FloatStorage", b"HalfStorage", b"LongStorage", b"_rebuild_tensor_v2", b"cpu")
        others = (*names, b"_rebuild_parameter", b"_rebuild_sparse_tensor", b"bytearray", b"meta")
        return data.replace(_one(names, rng), _one(others, rng), int(rng.integers(1, 9)))
    places = [i for i, byte in enumerate(data) if byte in b"KM"]  # numbers of one and two bytes
    place = places[rng.integers(len(places))]
    width = 2 if data[place : place + 1] == b"K" else 3
    numbers = (
        b"K\x00",
        b"K\x01",
        b"K\x07",
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"J\xff\xff\xff\xff",
    )
    large = b"\x8a\x08" + (2**62).to_bytes(8, "little")
    return data[:place] + _one((*numbers, large), rng) + data[place + width :]


def _one(values: Sequence[bytes], rng: Rng) -> bytes:
    return values[int(rng.integers(len(values)))]
