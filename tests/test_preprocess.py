"""Images and texts to feeds: exact pixels, refused inputs, and tokens that do not depend on the file's settings."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer as FileTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from distill.contracts import UserError
from distill.formats import image as image_format
from distill.formats.base import BadInput
from distill.formats.image import ImageFormat, decode_image
from distill.preprocess import Preprocessor, Tokenizer

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
BERT = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "red": 4, "heart": 5, "##s": 6, "flag": 7, "cat": 8, "!": 9}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def bert(tmp_path):
    tokenizer = FileTokenizer(models.WordPiece(BERT, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_padding(length=40)  # a saved setting that must not leak through
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "bert.json"))
    return tmp_path / "bert.json"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    vocab = {token: code for code, token in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS), "<start>", "<end>"])}
    tokenizer = FileTokenizer(models.BPE(vocab, [], continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    start, end = (("<start>", vocab["<start>"]), ("<end>", vocab["<end>"]))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    path = tmp_path_factory.mktemp("clip") / "clip.json"
    tokenizer.save(str(path))
    return path


def test_image_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = decode_image(encoded(Image.fromarray(pixels)), 16)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.array_equal(image, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_aspect_is_kept_by_white_padding(shape):
    image = decode_image(encoded(Image.new("RGB", shape, (255, 0, 0))), 16)
    green = image[1] if shape[1] > shape[0] else image[1].T
    assert (green[:, :4] == 255).all() and (green[:, 12:] == 255).all() and (green[:, 4:12] == 0).all()


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (21, 64)])
def test_cropping_keeps_the_centre_square(shape):
    whole = noise(*shape)
    side = min(shape)
    left, top = ((length - side) // 2 for length in shape)
    square = whole.crop((left, top, left + side, top + side))
    found = decode_image(encoded(whole), side, crop=True)
    if all((length - side) % 2 == 0 for length in shape):
        assert np.array_equal(found, decode_image(encoded(square), side))
    assert found.shape == (3, side, side)
    assert (decode_image(encoded(Image.new("RGB", shape, (255, 0, 0))), 16, crop=True)[1] == 0).all()


def test_a_long_thin_image_is_cropped_without_its_length():
    image = decode_image(encoded(Image.new("RGB", (60_000, 2), (0, 0, 0))), 16, crop=True)
    assert image.shape == (3, 16, 16) and (image == 0).all()


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((10, 20, 30, 255), (0, 0, 8, 4))
    image = decode_image(encoded(half), 8)
    assert (image[:, 4:] == 255).all() and (image[:, :4] == np.array([10, 20, 30])[:, None, None]).all()


def test_transparent_palette_is_laid_on_white():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.paste(0, (0, 0, 8, 4))
    image = decode_image(encoded(palette, "GIF", transparency=0), 8)
    assert (image[:, :4] == 255).all() and (image[:, 4:] == np.array([200, 10, 10])[:, None, None]).all()


def test_exif_orientation_is_applied():
    upright = Image.new("RGB", (8, 8), "white")
    upright.paste((0, 0, 0), (0, 0, 8, 4))  # black on top
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image = decode_image(encoded(upright.rotate(180), exif=exif), 8)
    assert (image[:, :4] == 0).all() and (image[:, 4:] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = Image.fromarray(np.full((8, 8), 0x4000, dtype=np.uint16))
    assert (decode_image(encoded(grey), 8) == 0x40).all()


def test_large_jpeg_is_close_to_its_full_decoding():
    ramp = np.tile(np.linspace(0, 255, 512).astype(np.uint8), (512, 1))
    image = decode_image(encoded(Image.fromarray(ramp).convert("RGB"), "JPEG", quality=95), 32)
    expected = np.asarray(Image.fromarray(ramp).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(image[0].astype(int) - expected).max() <= 3


def test_long_thin_image_needs_no_square_in_memory():
    image = decode_image(encoded(Image.new("RGB", (60_000, 2), (0, 0, 0))), 16)
    assert (image[0] == 0).sum() == 16


def test_path_and_bytes_agree(tmp_path):
    content = encoded(Image.new("RGB", (9, 9), (1, 2, 3)))
    (tmp_path / "a.png").write_bytes(content)
    expected = decode_image(content, 8)
    assert np.array_equal(decode_image(tmp_path / "a.png", 8), expected)
    assert np.array_equal(decode_image(str(tmp_path / "a.png"), 8), expected)


def test_bomb_is_refused_before_it_is_decoded(monkeypatch):
    content = encoded(Image.new("1", (3000, 2000)))
    monkeypatch.setattr(image_format, "MAX_PIXELS", 1_000_000)
    with pytest.raises(BadInput, match="3000x2000"):
        decode_image(content, 8)


def test_image_beyond_pillows_own_limit_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadInput):
        decode_image(encoded(Image.new("1", (100, 100))), 8)


@pytest.mark.parametrize("kind", image_format.FILE_TYPES)
def test_every_listed_format_is_read(kind):
    image = decode_image(encoded(Image.new("RGB", (8, 8), (200, 100, 50)), kind), 8)
    assert np.abs(image.mean(axis=(1, 2)) - [200, 100, 50]).max() < 8


def test_other_formats_are_refused():
    with pytest.raises(BadInput, match="not a readable image"):
        decode_image(encoded(noise(8, 8), "EPS"), 8)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.png"):
        decode_image(tmp_path / "gone.png", 8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_image_gives_pixels_or_bad_input(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    content = bytearray(encoded(noise(20, 20), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content[: data.draw(st.integers(0, len(content)))]), 8)
    except BadInput as error:
        assert "0x" not in str(error)
    else:
        assert image.shape == (3, 8, 8)


def test_tokens_ignore_the_settings_saved_in_the_file(bert):
    ids, mask = Tokenizer(bert, 8)(["red hearts", "cat"])
    assert ids.tolist() == [[1, 4, 5, 6, 2], [1, 8, 2, 0, 0]]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert ids.dtype == np.int64 and mask.dtype == bool


def test_truncation_keeps_the_closing_token(bert):
    ids, _ = Tokenizer(bert, 4)(["red heart cat flag"])
    assert ids.tolist() == [[1, 4, 5, 2]]


def test_pad_id_and_empty_texts(bert):
    ids, mask = Tokenizer(bert, 8, pad_id=9)(["cat", "", "  "])
    assert ids.tolist() == [[1, 8, 2], [9, 9, 9], [9, 9, 9]]
    assert mask.any(axis=1).tolist() == [True, False, False]


def test_no_text_at_all_still_has_a_column(bert):
    tokenizer = Tokenizer(bert, 8)
    assert tokenizer([""])[0].shape == (1, 1)
    assert tokenizer([])[0].shape == (0, 1)


def test_words_of_wordpieces_and_punctuation(bert):
    _, _, words = Tokenizer(bert, 8).words(["red  hearts! cat", "cat", ""])
    assert words.tolist() == [[-1, 0, 1, 1, 1, 2, -1], [-1, 0, -1, -1, -1, -1, -1], [-1] * 7]


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=5), data=st.data())
def test_dropping_words_from_the_tokens_is_dropping_them_from_the_text(clip, words, data):
    tokenizer = Tokenizer(clip, 40)
    kept = data.draw(st.sets(st.integers(0, len(words) - 1), min_size=1))
    ids, mask, word_of = tokenizer.words([" ".join(words)])
    stays = mask & ((word_of < 0) | np.isin(word_of, list(kept)))
    expected, _ = tokenizer([" ".join(words[index] for index in sorted(kept))])
    assert ids[stays].tolist() == expected[0].tolist()


def test_tokens_of_one_text_do_not_depend_on_the_others(bert):
    tokenizer = Tokenizer(bert, 8)
    together, mask = tokenizer(["cat", "red heart flag"])
    alone, _ = tokenizer(["cat"])
    assert together[0][mask[0]].tolist() == alone[0].tolist()


@pytest.mark.parametrize(
    ("content", "max_length", "message"),
    [(None, 8, "no tokenizer file"), ("{}", 8, "not a tokenizer"), ("bert", 2, "max_length 2")],
)
def test_unusable_tokenizers_are_refused(tmp_path, bert, content, max_length, message):
    path = bert if content == "bert" else tmp_path / "other.json"
    if content == "{}":
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer(path, max_length)


def test_rows_become_feeds(bert, tmp_path):
    content = encoded(Image.new("RGB", (8, 8), (7, 8, 9)))
    feeds = Preprocessor({"image": ImageFormat(8)}, Tokenizer(bert, 8))(
        [{"image": content, "text": "cat"}, {"text": ""}, {"image": content}]
    )
    assert feeds["image_present"].tolist() == [True, False, True]
    assert feeds["text_present"].tolist() == [True, False, False]
    assert feeds["text"].tolist() == [[1, 8, 2], [0, 0, 0], [0, 0, 0]] and not feeds["text_mask"][1:].any()
    assert not feeds["image"][1].any() and feeds["image"][0, :, 0, 0].tolist() == [7, 8, 9]


def test_only_the_models_modalities_are_fed(bert):
    assert set(Preprocessor({"image": ImageFormat(8)})([{"text": "cat"}])) == {"image", "image_present"}
    assert set(Preprocessor({}, Tokenizer(bert, 8))([{}])) == {"text", "text_mask", "text_present"}


def test_no_rows_give_empty_feeds(bert):
    feeds = Preprocessor({"image": ImageFormat(8)}, Tokenizer(bert, 8))([])
    assert feeds["image"].shape == (0, 3, 8, 8) and feeds["text"].shape == (0, 1)


def test_decoded_arrays_are_taken_as_they_are():
    pixels = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    assert np.array_equal(Preprocessor({"image": ImageFormat(8)})([{"image": pixels}])["image"][0], pixels)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"no image"}, "row 1: not a readable image"),
        ({"image": 3}, "row 1: image is a int"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, r"row 1: .*\(8, 8, 3\)"),
        ({"text": 3}, "row 1: text is a int"),
    ],
)
def test_bad_rows_are_named(bert, row, message):
    with pytest.raises(BadInput, match=message):
        Preprocessor({"image": ImageFormat(8)}, Tokenizer(bert, 8))([{}, row])


def test_saved_preprocessing_is_the_same(bert, tmp_path):
    rows = [{"image": encoded(noise(30, 20)), "text": "red hearts flag"}]
    before = Preprocessor({"image": ImageFormat(16)}, Tokenizer(bert, 5, pad_id=9))
    before.save(tmp_path / "bundle")
    before.save(tmp_path / "bundle")  # saving again over itself is harmless
    after = Preprocessor.load(tmp_path / "bundle")
    after.save(tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "preprocess.json").read_text()) == {
        "image": {"size": 16, "crop": False},
        "text": {"tokenizer": "tokenizer.json", "max_length": 5, "pad_id": 9},
    }
    for name, feed in before(rows).items():
        assert np.array_equal(feed, after(rows)[name]), name


def test_a_bundle_crops_as_its_training_did(tmp_path):
    rows = [{"image": encoded(noise(30, 20))}]
    Preprocessor({"image": ImageFormat(16, crop=True)}).save(tmp_path)
    found = Preprocessor.load(tmp_path)(rows)["image"][0]
    assert np.array_equal(found, decode_image(rows[0]["image"], 16, crop=True))
    assert not np.array_equal(found, Preprocessor({"image": ImageFormat(16)})(rows)["image"][0])


@pytest.mark.parametrize("content", [None, "nonsense", '{"image": {}}', "[]", '{"text": {"tokenizer": "x"}}'])
def test_malformed_bundles_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocess\.json"):
        Preprocessor.load(tmp_path)


def test_a_tokenizer_outside_the_bundle_is_not_read(tmp_path, bert):
    (tmp_path / "bundle").mkdir()
    spec = {"text": {"tokenizer": "../bert.json", "max_length": 8, "pad_id": 0}}
    (tmp_path / "bundle" / "preprocess.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"names the tokenizer '\.\./bert\.json' and not tokenizer\.json"):
        Preprocessor.load(tmp_path / "bundle")


def test_no_torch_is_imported():
    code = "import sys, distill.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
