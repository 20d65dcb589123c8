"""Features on the disk: what is kept, how far it is off, what damage is found, and what goes when there is no room."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, config, model
from safetensors.torch import load_file
from torch import Tensor

from d2kd.modeling import Teacher
from d2kd.modeling.feature_cache import (
    DTYPES,
    FOUND,
    DamagedEntryError,
    FeatureCache,
    FeatureStore,
    decode,
    encode,
    image_key,
    read_entry,
    size_of,
)
from d2kd.modeling.padding import Padding
from d2kd.modeling.teacher_passes import Acceleration, CachedDensePass, DensePass, TeacherFeatures, TeacherPasses

CPU = torch.device("cpu")


def back(features: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Features as they come back."""
    content = encode(features, dtype, "k")
    return decode(read_entry(torch.frombuffer(bytearray(content), dtype=torch.uint8), "k"), CPU)


def random_map(scale: float = 1.0, channels: int = 6, side: int = 5) -> Tensor:
    """A map with channels of different ranges, one of them constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator) * scale
    x *= torch.logspace(-3, 3, channels)[None, :, None, None]
    x[:, 1] = 0.25 * scale
    return x


# ---- what is kept ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_float32_keeps_every_bit_of_whatever_the_teacher_gives(dtype: torch.dtype) -> None:
    features = {"p3": random_map().to(dtype), "logits": torch.randn(1, 10).to(dtype), "odd": torch.zeros(1, 3, 1, 1)}
    found = back(features, "float32")
    assert all(torch.equal(found[k], features[k]) and found[k].dtype == features[k].dtype for k in features)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(1, 9))
def test_float16_is_off_by_half_a_thousandth_at_most_whatever_the_range(scale: float, side: int) -> None:
    x = random_map(scale, side=side)
    error = (back({"p3": x}, "float16")["p3"] - x).abs()
    assert (error <= 2**-11 * x.abs() + 2**-39 * x.abs().max()).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(3, 9))
def test_int8_is_off_by_half_a_level_of_each_channel_at_most(scale: float, side: int) -> None:
    x = random_map(scale, side=side)
    error = (back({"p3": x}, "int8")["p3"] - x).abs().amax((2, 3))
    low, high = x.amin((2, 3)), x.amax((2, 3))
    assert (error <= (high - low) / 255 / 2 + 1e-5 * torch.maximum(low.abs(), high.abs())).all()
    assert error[0, 1] == 0, "a constant channel is exact"


def test_maps_of_few_positions_take_less_room_in_float16_than_in_8_bits() -> None:
    x = {"p7": torch.randn(1, 256, 1, 1)}
    assert len(encode(x, "int8", "k")) == len(encode(x, "float16", "k"))
    assert torch.equal(back(x, "int8")["p7"], back(x, "float16")["p7"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256, 100, 168), (1, 256, 2, 2), (1, 1000)])
def test_the_arithmetic_of_sizes_is_that_of_the_files(dtype: str, shape: tuple[int, ...]) -> None:
    size = len(encode({"p3": torch.randn(shape)}, dtype, "k"))
    assert 0 < size - size_of(shape, dtype) < 600  # the header


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_kept(bad: float) -> None:
    with pytest.raises(ValueError, match="p3 has numbers that are not finite"):
        encode({"p3": torch.tensor([[bad]])}, "int8", "k")


def test_other_programs_can_read_an_entry(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(encode({"p3": random_map()}, "float32", "k"))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["p3"], random_map())


# ---- damage ----


def test_every_truncation_and_every_altered_byte_is_found() -> None:
    content = encode({"p3": torch.randn(1, 2, 2, 2), "p4": torch.randn(1, 2)}, "float16", "k")
    whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    expected = decode(read_entry(whole, "k"), CPU)
    for end in range(len(content)):
        with pytest.raises(DamagedEntryError):
            read_entry(whole[:end], "k")
    for place in range(len(content)):
        altered = whole.clone()
        altered[place] ^= 0x55
        try:
            found = decode(read_entry(altered, "k"), CPU)
        except DamagedEntryError:
            continue
        # an altered blank between the parts of the header changes nothing
        assert all(torch.equal(found[k], expected[k]) for k in expected), place


def test_an_entry_in_the_place_of_another_is_found_out() -> None:
    data = torch.frombuffer(bytearray(encode({"p3": random_map()}, "int8", "k")), dtype=torch.uint8)
    with pytest.raises(DamagedEntryError, match="altered"):
        read_entry(data, "other")


def test_a_damaged_file_is_removed_and_told_of(tmp_path: Path, caplog: Any) -> None:
    store = FeatureStore(tmp_path, 10**6)
    store.write("c", "aa11", encode({"p3": random_map()}, "float32", "aa11"))
    path = store.path("c", "aa11")
    path.write_bytes(path.read_bytes()[:-5])
    assert store.read("c", "aa11") is None
    assert store.damaged == 1 and not path.exists()
    assert "aa11.safetensors is damaged (truncated): it is removed, and the teacher runs." in caplog.text
    path.write_bytes(b"")
    assert store.read("c", "aa11") is None and store.damaged == 2


# ---- identity ----


def test_the_key_is_that_of_pixels_padding_number_and_collection() -> None:
    image = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    altered = image.clone()
    altered[2, 7, 5] ^= 1
    keys = {
        image_key(image, (32, 32), 4, "a"),
        image_key(altered, (32, 32), 4, "a"),
        image_key(image.flip(2), (32, 32), 4, "a"),
        image_key(image, (32, 64), 4, "a"),
        image_key(image, (32, 32), 3, "a"),
        image_key(image, (32, 32), 4, "b"),
        image_key(image.reshape(3, 6, 8), (32, 32), 4, "a"),
        image_key(image.short(), (32, 32), 4, "a"),
    }
    assert len(keys) == 8
    assert image_key(image.transpose(1, 2).contiguous().transpose(1, 2), (32, 32), 4, "a") in keys


# ---- the bound ----


def fill(store: FeatureStore, names: list[str], collection: str = "c") -> int:
    """Writes entries of one size, each used later than the one before; returns that size."""
    content = b""
    for name in names:
        content = encode({"p3": torch.zeros(1, 100)}, "float32", name)
        assert store.write(collection, name, content)
    return len(content)


def age(store: FeatureStore, names: list[str]) -> None:
    """The first was used the longest ago."""
    for number, name in enumerate(names):
        os.utime(store.path("c", name), (time.time() - 1000 + number, time.time() - 1000 + number))


def about(folder: Path, *collections: str) -> None:
    """What makes folders collections."""
    for name in collections:
        (folder / name).mkdir(parents=True)
        (folder / name / "about.json").write_text("{}")


def test_those_that_were_used_least_recently_make_room(tmp_path: Path) -> None:
    about(tmp_path, "c")
    size = fill(FeatureStore(tmp_path, 10**9), ["aa", "bb", "cc", "dd"])
    store = FeatureStore(tmp_path, 4 * size)
    age(store, ["aa", "bb", "cc", "dd"])
    assert store.read("c", "aa") is not None  # is the most recent now
    fill(store, ["ee"])
    names = {entry.path.stem for entry in store.entries()}
    assert "bb" not in names and {"aa", "ee"} <= names
    assert sum(entry.size for entry in store.entries()) <= store.max_bytes


def test_a_cache_that_is_too_small_is_told_of_once(tmp_path: Path, caplog: Any) -> None:
    about(tmp_path, "c")
    size = len(encode({"p3": torch.zeros(1, 100)}, "float32", "a0"))
    fill(FeatureStore(tmp_path, 2 * size), [f"a{number}" for number in range(6)])
    warned = [record.message for record in caplog.records if "MAX_GB" in record.message]
    assert len(warned) == 1 and "raise MAX_GB, or set DISTILL.CACHE.DTYPE to float16 or int8" in warned[0]


def test_the_bound_is_that_of_all_collections(tmp_path: Path) -> None:
    about(tmp_path, "c", "other")
    size = fill(FeatureStore(tmp_path, 10**9), ["aa", "bb"])
    store = FeatureStore(tmp_path, 2 * size)
    fill(store, ["cc"], "other")
    assert sum(entry.size for entry in store.entries()) <= 2 * size
    assert [entry.path.stem for entry in store.entries("other")] == ["cc"]


def test_an_entry_beyond_the_bound_is_not_kept_and_nothing_goes_for_it(tmp_path: Path) -> None:
    about(tmp_path, "c")
    store = FeatureStore(tmp_path, 2000)
    fill(store, ["aa"])
    assert not store.write("c", "bb", encode({"p3": torch.zeros(1, 1000)}, "float32", "bb"))
    assert [entry.path.stem for entry in store.entries()] == ["aa"]


def test_the_bound_holds_for_writers_at_once(tmp_path: Path) -> None:
    about(tmp_path, "c")
    size = len(encode({"p3": torch.zeros(1, 100)}, "float32", "a0"))
    stores = [FeatureStore(tmp_path, 7 * size) for _ in range(3)]
    most = []

    def write(store: FeatureStore, letter: str) -> None:
        fill(store, [f"{letter}{number}" for number in range(8)])
        with store._lock():  # nobody removes what was counted, and puts another in its place
            most.append(sum(entry.size for entry in store.entries()))

    threads = [threading.Thread(target=write, args=(s, letter)) for s, letter in zip(stores, "abc")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 7 * size
    assert all(store.read("c", entry.path.stem) is not None for store in stores[:1] for entry in store.entries())


def test_what_killed_processes_leave_is_neither_counted_nor_kept(tmp_path: Path) -> None:
    about(tmp_path, "c")
    store = FeatureStore(tmp_path, 10**6)
    fill(store, ["aa"])
    left = store.path("c", "aa").with_name(".bb.1234.tmp.safetensors")
    left.write_bytes(b"half")
    assert [entry.path.stem for entry in store.entries()] == ["aa"] and left.exists()
    os.utime(left, (0, 0))
    assert [entry.path.stem for entry in store.entries()] == ["aa"] and not left.exists()


def test_collections_are_removed_one_by_one_or_all(tmp_path: Path) -> None:
    about(tmp_path, "c", "other")
    (tmp_path / "mine").mkdir()  # is no collection
    (tmp_path / "mine" / "file").write_text("x")
    store = FeatureStore(tmp_path, 10**6)
    size = fill(store, ["aa", "bb"])
    fill(store, ["cc"], "other")
    assert store.clear("c") == (2, 2 * size)
    assert [path.name for path in store.collections()] == ["other"]
    assert store.clear() == (1, size)
    assert (tmp_path / "mine" / "file").exists()


# ---- the pass ----

TAPS = ["p3", "p5", "head.cls_score@0"]


def passes(folder: Path, **changes: Any) -> tuple[DensePass, CachedDensePass]:
    """A teacher's pass, and the same with a cache."""
    teacher = Teacher(model(config(), seed=7))
    options: dict[str, Any] = {"dtype": "float32", "alone": False, "max_bytes": 10**9, **changes}
    cache = FeatureCache(str(folder), {"teacher": 7}, Padding.of(teacher.model), **options)
    return DensePass(teacher, TAPS), CachedDensePass(teacher, TAPS, cache)


def test_the_pass_is_equal_to_the_teacher_to_the_bit_also_in_batches_of_several_sizes(tmp_path: Path) -> None:
    plain, cached = passes(tmp_path)
    for sizes in ([(64, 96), (96, 64), (64, 64)], [(64, 64)] * 3):
        images = batch(sizes)
        expected = plain(images).maps
        for misses in (3, 0):
            cached.cache.misses = 0
            found = cached(images).maps
            assert all(torch.equal(found[tap], expected[tap]) for tap in TAPS)
            assert cached.cache.misses == misses
            cached.cache.flush()
    mixed = [*batch([(64, 64)] * 3)[:2], *batch([(64, 64)], seed=3)]
    cached.cache.misses = 0
    assert all(torch.equal(x, plain(mixed).maps[tap]) for tap, x in cached(mixed).maps.items())
    assert cached.cache.misses == 1


def test_what_pinned_memory_makes_of_a_batch_is_read(tmp_path: Path) -> None:
    """Versions of PyTorch make lists of the tuples in it."""
    plain, cached = passes(tmp_path)
    images = batch([(64, 96), (64, 64)])
    for image, found in zip(images, cached.cache.find(images)):
        image[FOUND] = found._replace(canvas=list(found.canvas))  # type: ignore[arg-type]
    assert all(torch.equal(x, plain(images).maps[tap]) for tap, x in cached(images).maps.items())


def test_a_faster_teacher_is_kept_as_it_is(tmp_path: Path) -> None:
    teacher = Teacher(model(config(), seed=7))
    cache = FeatureCache(str(tmp_path), {}, Padding.of(teacher.model), dtype="float32", alone=False, max_bytes=10**9)
    cached = CachedDensePass(teacher, TAPS, cache, Acceleration(fold_norms=True, channels_last=True))
    images = batch([(64, 64)] * 2)
    expected = cached.uncached()(images).maps
    for _ in range(2):
        assert all(torch.equal(x, expected[tap]) for tap, x in cached(images).maps.items())
        cache.flush()
    assert cache.hits == cache.misses == 2


def test_images_alone_have_one_entry_for_all_batches(tmp_path: Path) -> None:
    plain, cached = passes(tmp_path, alone=True)
    one, other = batch([(64, 96), (96, 64)])
    found = cached([one, other]).maps
    assert cached.cache.misses == 2
    for number, (inputs, height, width) in enumerate(((one, 64, 96), (other, 96, 64))):
        alone = plain([inputs]).maps
        for tap, stride in (("p3", 8), ("p5", 32)):
            assert torch.equal(found[tap][number, :, : height // stride, : width // stride], alone[tap][0])
    padding = plain([{"image": torch.zeros(3, 96, 96)}]).maps["p3"].shape
    assert found["p3"].shape[-2:] == padding[-2:]
    cached.cache.flush()
    again = cached([other, one]).maps
    assert cached.cache.misses == 2, "neither the images nor what lies around them"
    assert all(torch.equal(again[tap], found[tap].flip(0)) for tap in TAPS)
    cached([one])
    cached([one, one, other])
    assert cached.cache.misses == 2


def test_around_an_image_alone_lies_what_the_teacher_gives_for_padding(tmp_path: Path) -> None:
    plain, cached = passes(tmp_path, alone=True)
    images = batch([(64, 64), (256, 256)])
    together, alone = plain(images).maps["p3"], cached(images).maps["p3"]
    assert torch.allclose(alone[1], together[1], atol=1e-5 * float(together.abs().max()))
    # far from the image, and from the borders, the padding of the batch is the same
    assert torch.allclose(alone[0, :, 26:30, 26:30], together[0, :, 26:30, 26:30], atol=0.05 * together.abs().max())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_was_just_computed_is_compared_as_it_will_be_read(tmp_path: Path, dtype: str) -> None:
    plain, cached = passes(tmp_path, dtype=dtype)
    images = batch([(64, 64)] * 2)
    first = cached(images).maps
    cached.cache.flush()
    second = cached(images).maps
    assert (cached.cache.misses, cached.cache.hits) == (2, 2)
    assert all(torch.equal(first[tap], second[tap]) for tap in TAPS)
    assert not torch.equal(first["p3"], plain(images).maps["p3"])


def test_a_full_disk_ends_the_writing_with_one_warning(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    plain, cached = passes(tmp_path)
    images = batch([(64, 64)] * 2)

    def full(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cached.cache.store, "write", full)
    for _ in range(3):
        found = cached(images).maps
        cached.cache.flush()
        assert all(torch.equal(found[tap], x) for tap, x in plain(images).maps.items())
    warnings = [record.message for record in caplog.records if "No space left" in record.message]
    assert len(warnings) == 1 and "for all else the teacher runs" in warnings[0]


@pytest.mark.parametrize(("stored", "expected"), [(True, ["read"]), (False, ["computed"])])
@pytest.mark.parametrize("methods", [None, ["A"]])
def test_passes_of_some_methods_read_the_cache_too_but_images_on_the_side_do_not(methods, stored, expected):
    seen = []

    class Watched(DensePass):
        def __call__(self, batched_inputs, guidance=None, dense=None):
            seen.append("read")
            return TeacherFeatures({}, {})

        def direct(self, batched_inputs):
            seen.append("computed")
            return TeacherFeatures({}, {})

    passes = TeacherPasses(Watched(Teacher(model()), ["p3"]), {}, {"A": [], "B": []})
    with passes.around_student(batch(), methods, stored=stored) as features:
        pass
    assert seen == expected and list(features) == (methods or ["A", "B"])


def test_bytes_that_could_not_be_written_do_not_count(tmp_path: Path, monkeypatch: Any) -> None:
    store = FeatureStore(tmp_path, 10_000)
    assert store.write("a", "00first", b"x" * 1000)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        for number in range(8):
            with pytest.raises(OSError, match="No space"):
                store.write("a", f"00{number}", b"x" * 1000)
    for number in range(8):  # else there would be no room for them beside the first
        assert store.write("a", f"01{number}", b"x" * 1000)
    assert store.path("a", "00first").exists()
