"""Small encoders, and what they inherit: a smaller vocabulary that still spells every text, and a table."""

import json
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, WORDS
from tiny_project import RECIPE, distill, make_rows, refusal
from tokenizers import Tokenizer

from distill.contracts import UserError
from distill.runs import read_json
from students import INHERITANCES, CifarResNet, ConvNet, StaticEmbeddings, encoder_weights, token_embeddings
from students.inherit import embed_tokens, reduce_width, share_rows
from students.vocabulary import frame_ids, reduce_vocabulary, renumber, word_pieces
from teachers import PretrainedText

NEEDED = len(SPECIAL) + 2 * len(string.ascii_lowercase)


def images(rows=3, size=32):
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("widths", "blocks"), [([4], [0]), ([4, 8], [0, 1]), ([4, 8, 12], [1, 2, 0])])
def test_a_convnet_halves_the_resolution_in_each_stage(widths, blocks):
    encoder = ConvNet(widths=widths, blocks=blocks).eval()
    encoded = encoder({"image": images()})
    side = 32 // 2 ** len(widths)
    assert encoded.tokens.shape == (3, side * side, widths[-1]) and encoder.out_dim == widths[-1]
    assert encoded.mask.shape == (3, side * side) and encoded.mask.all() and encoded.mask.dtype == torch.bool
    torch.testing.assert_close(encoded.pooled, encoded.tokens.mean(1))
    assert encoder.stages(images().float()).shape == (3, widths[-1], side, side)


def test_a_convnet_reads_bytes_centred_on_zero():
    encoder = ConvNet(widths=[4], blocks=[0]).eval()
    seen = []
    encoder.stages.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    encoder({"image": extremes})
    assert seen[0].dtype == torch.float32 and seen[0][0].unique() == -1 and seen[0][1].unique() == 1


def test_a_convnet_of_unequal_lists_is_refused():
    with pytest.raises(ValueError, match="widths has 2 stages and blocks has 1; give as many of each"):
        ConvNet(widths=[4, 8], blocks=[1])


@pytest.mark.parametrize(
    ("depth", "widths", "millions"),
    [
        (8, [32, 64, 128, 256], 1.233540),
        (32, [32, 64, 128, 256], 7.433860),
        (20, [16, 16, 32, 64], 0.278324),
        (56, [16, 16, 32, 64], 0.861620),
    ],
)
def test_resnets_of_cifar_have_the_published_size(depth, widths, millions):
    encoder = CifarResNet(depth=depth, widths=widths).eval()
    head = 100 * (widths[-1] + 1)
    assert sum(p.numel() for p in encoder.parameters()) + head == round(millions * 1e6)
    assert sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in encoder.modules()) == depth - 1
    encoded = encoder({"image": images(2)})
    assert encoded.tokens.shape == (2, 64, widths[-1]) and encoder.out_dim == widths[-1] and encoded.mask.all()
    torch.testing.assert_close(encoded.pooled, encoded.tokens.mean(1))


def test_a_resnet_of_cifar_normalises_bytes():
    encoder = CifarResNet(depth=8, widths=[4, 4, 4, 4], mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 2.0]).eval()
    seen = []
    encoder.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder({"image": torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)})
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))
    assert not {"mean", "std"} & encoder.state_dict().keys()


@pytest.mark.parametrize("options", [{"depth": 9}, {"depth": 2}, {"depth": 8, "widths": [4, 4, 4]}])
def test_a_resnet_of_another_shape_is_refused(options):
    with pytest.raises(ValueError, match=r"it is 6n \+ 2|widths are four"):
        CifarResNet(**options)


def test_static_embeddings_are_the_masked_mean_of_the_table(wordpiece_file):
    encoder = StaticEmbeddings(tokenizer_file=wordpiece_file, vocab_size=20, dim=6)
    text = torch.tensor([[3, 4, 5], [7, 0, 0], [0, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    encoded = encoder({"text": text, "text_mask": mask})
    table = encoder.table.weight
    torch.testing.assert_close(encoded.pooled[0], table[[3, 4, 5]].mean(0))
    torch.testing.assert_close(encoded.pooled[1], table[7])
    assert torch.equal(encoded.pooled[2], torch.zeros(6))  # a text of no tokens
    assert encoded.tokens.shape == (3, 3, 6) and torch.equal(encoded.mask, mask) and encoder.out_dim == 6


def test_dropout_acts_in_training_only(wordpiece_file):
    inputs = {"text": torch.ones(2, 3, dtype=torch.int64), "text_mask": torch.ones(2, 3, dtype=torch.bool)}
    encoder = StaticEmbeddings(tokenizer_file=wordpiece_file, vocab_size=20, dim=64, dropout=0.5)
    assert (encoder(inputs).pooled == 0).any()
    assert torch.equal(encoder.eval()(inputs).pooled, encoder(inputs).pooled)
    assert not (encoder(inputs).pooled == 0).any()


TEXTS = ["red cat", "the dog", "a red moon"]


@pytest.fixture(scope="module")
def reduced(wordpiece_file, tmp_path_factory):
    """The tiny tokenizer cut to special tokens, characters and the words of three texts but one."""
    target = tmp_path_factory.mktemp("reduced") / "tokenizer.json"
    full = Tokenizer.from_file(str(wordpiece_file))
    words = len({word for text in TEXTS for word in text.split() if len(word) > 1})
    ids = reduce_vocabulary(wordpiece_file, TEXTS, NEEDED + words, target)
    return full, Tokenizer.from_file(str(target)), ids


def test_a_reduced_vocabulary_keeps_special_tokens_characters_and_what_training_saw(reduced):
    full, small, ids = reduced
    kept = {full.id_to_token(int(old)) for old in ids}
    assert kept >= set(SPECIAL) | set(string.ascii_lowercase) | {f"##{letter}" for letter in string.ascii_lowercase}
    assert {"red", "cat", "the", "dog", "moon"} == {token for token in kept if token in WORDS and len(token) > 1}
    assert small.get_vocab_size() == len(ids) == len(kept) < full.get_vocab_size()


def test_new_ids_are_dense_in_the_old_order_and_lead_back(reduced):
    full, small, ids = reduced
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all()
    assert sorted(small.get_vocab().values()) == list(range(len(ids)))
    for token, new in small.get_vocab().items():
        assert full.id_to_token(int(ids[new])) == token
    assert small.token_to_id("[PAD]") == 0  # what StaticEmbeddings pads with


def test_texts_whose_tokens_are_all_kept_map_one_to_one(reduced):
    full, small, ids = reduced
    for text in [*TEXTS, "moon red dog cat", "xyz ab"]:
        one, other = full.encode(text), small.encode(text)
        assert one.tokens == other.tokens and ids[other.ids].tolist() == one.ids
        assert other.tokens[0] == "[CLS]" and other.tokens[-1] == "[SEP]"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet=string.ascii_lowercase, min_size=1, max_size=12), min_size=1, max_size=6))
def test_every_text_still_tokenizes(reduced, words):
    full, small, _ = reduced
    text = " ".join([*words, "green", "small"])  # whole words of the old vocabulary that were dropped
    one, other = full.encode(text), small.encode(text)
    assert "[UNK]" not in other.tokens
    assert "".join(t.removeprefix("##") for t in other.tokens) == "".join(t.removeprefix("##") for t in one.tokens)
    assert max(other.ids) < small.get_vocab_size()


def test_an_unknown_character_is_still_unknown(reduced):
    _, small, _ = reduced
    assert small.encode("ж").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_the_most_frequent_words_are_kept_first(wordpiece_file, tmp_path):
    texts = ["moon moon moon", "dog dog", "cat"]
    ids = reduce_vocabulary(wordpiece_file, texts, NEEDED + 2, tmp_path / "tokenizer.json")
    full = Tokenizer.from_file(str(wordpiece_file))
    assert {full.id_to_token(int(old)) for old in ids} & set(WORDS) - {"a"} == {"moon", "dog"}


def test_the_whole_vocabulary_may_be_kept(wordpiece_file, tmp_path):
    size = Tokenizer.from_file(str(wordpiece_file)).get_vocab_size()
    assert reduce_vocabulary(wordpiece_file, TEXTS, size, tmp_path / "t.json").tolist() == list(range(size))


@pytest.mark.parametrize("size", [NEEDED - 1, 10, 10_000])
def test_a_size_that_does_not_fit_is_refused(wordpiece_file, tmp_path, size):
    with pytest.raises(
        UserError, match=f"vocab_size {size} does not fit .* alone are {NEEDED}, .* choose a size between"
    ):
        reduce_vocabulary(wordpiece_file, TEXTS, size, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_bpe_vocabulary_is_refused(clip_folder, tmp_path):
    with pytest.raises(UserError, match="only WordPiece vocabularies can be reduced, this is BPE"):
        reduce_vocabulary(clip_folder / "tokenizer.json", TEXTS, 100, tmp_path / "tokenizer.json")


def test_special_tokens_are_found_even_if_they_were_never_added_as_such(wordpiece_file, tmp_path):
    """A tokenizer.json may name them in its model and its post-processor only."""
    tree = json.loads(wordpiece_file.read_text())
    tree["added_tokens"] = []
    (tmp_path / "bare.json").write_text(json.dumps(tree))
    reduce_vocabulary(tmp_path / "bare.json", TEXTS, NEEDED, tmp_path / "tokenizer.json")
    small = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert small.encode("ж").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_the_tokens_of_a_berts_own_post_processor_are_renumbered(wordpiece_file, tmp_path):
    tree = json.loads(wordpiece_file.read_text())
    vocab = tree["model"]["vocab"]
    order = [token for token in vocab if token not in ("[CLS]", "[SEP]")] + ["[CLS]", "[SEP]"]  # far behind
    tree["model"]["vocab"] = vocab = {token: code for code, token in enumerate(order)}
    for entry in tree["added_tokens"]:
        entry["id"] = vocab[entry["content"]]
    tree["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["[SEP]", vocab["[SEP]"]],
        "cls": ["[CLS]", vocab["[CLS]"]],
    }
    (tmp_path / "bert.json").write_text(json.dumps(tree))
    ids = reduce_vocabulary(tmp_path / "bert.json", TEXTS, NEEDED + 1, tmp_path / "tokenizer.json")
    encoding = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("b")
    assert encoding.ids[0] == len(ids) - 2 and encoding.ids[-1] == len(ids) - 1
    assert ids[encoding.ids].tolist() == [vocab["[CLS]"], vocab["b"], vocab["[SEP]"]]


def test_the_table_is_the_reduced_output_of_the_teacher(bert_folder, wordpiece_file, reduced):
    _, _, ids = reduced
    teacher = PretrainedText(weights=f"path:{bert_folder}").eval()
    student = StaticEmbeddings(tokenizer_file=wordpiece_file, vocab_size=len(ids), dim=6)
    before = student.table.weight.detach().clone()
    token_embeddings(encoder=teacher, project=torch.nn.Identity(), student=student, token_ids=ids, share=False)
    table = student.table.weight
    assert not torch.equal(table, before) and not table.requires_grad
    opening, closing = frame_ids(teacher.tokenizer_file)
    word = torch.tensor([[opening, int(ids[60]), closing]])
    with torch.no_grad():
        alone = teacher.encode(word, torch.ones_like(word, dtype=torch.bool)).mean(1)
    outputs = embed_tokens(teacher.encode, ids, (opening, closing), batch_size=7)
    torch.testing.assert_close(outputs[60], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table.detach(), reduce_width(outputs, 6, rarity_weight=False), rtol=1e-3, atol=1e-4)


def test_an_inherited_table_may_stay_trainable(bert_folder, wordpiece_file):
    teacher = PretrainedText(weights=f"path:{bert_folder}").eval()
    student = StaticEmbeddings(tokenizer_file=wordpiece_file, vocab_size=10, dim=4)
    given = {"encoder": teacher, "project": torch.nn.Identity(), "student": student, "token_ids": np.arange(10)}
    INHERITANCES["token_embeddings"](**given, freeze=False, share=False)
    assert student.table.weight.requires_grad


def test_every_token_of_the_teacher_gets_a_row_of_a_smaller_table(bert_folder, wordpiece_file, reduced, tmp_path):
    full, small, ids = reduced
    teacher = PretrainedText(weights=f"path:{bert_folder}").eval()
    student = StaticEmbeddings(tokenizer_file=tmp_path / "tokenizer.json", vocab_size=len(ids), dim=6)
    token_embeddings(encoder=teacher, project=torch.nn.Identity(), student=student, token_ids=ids)
    shared = Tokenizer.from_file(str(student.tokenizer_file))
    dropped = set(full.get_vocab()) - set(small.get_vocab())
    assert dropped and all(shared.encode(word).tokens == full.encode(word).tokens for word in dropped)
    rows = shared.get_vocab()
    assert rows.keys() == full.get_vocab().keys() and {*rows.values()} <= set(range(len(ids)))
    taken = sorted(rows.values())
    for token in SPECIAL:  # these share with nobody
        assert rows[token] == small.token_to_id(token) and taken.count(rows[token]) == 1
    known = word_pieces(teacher.tokenizer_file)
    every = embed_tokens(teacher.encode, np.array([*known.values()]), frame_ids(teacher.tokenizer_file))
    centres, found = share_rows(
        reduce_width(every, 6, rarity_weight=False), ids, np.isin(ids, [known[t] for t in SPECIAL])
    )
    assert [rows[token] for token in known] == found.tolist()
    torch.testing.assert_close(student.table.weight.detach(), centres)


def test_a_table_with_a_row_a_token_is_not_shared(bert_folder, wordpiece_file, tmp_path):
    teacher = PretrainedText(weights=f"path:{bert_folder}").eval()
    whole = np.arange(len(word_pieces(wordpiece_file)))
    tables = []
    for share in (True, False):
        student = StaticEmbeddings(tokenizer_file=tmp_path / "absent.json", vocab_size=len(whole), dim=6)
        given = {"encoder": teacher, "project": torch.nn.Identity(), "student": student, "token_ids": whole}
        token_embeddings(**given, share=share)
        tables.append(student.table.weight.detach())
    assert torch.equal(*tables) and not (tmp_path / "absent.json").exists()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.data())
def test_tokens_share_the_nearest_row(count, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    table = torch.randn(count, 3, generator=generator)
    size = data.draw(st.integers(1, count))
    own = np.sort(torch.randperm(count, generator=generator)[:size].numpy())
    alone = np.zeros(size, dtype=bool)
    alone[: data.draw(st.integers(0, size - 1))] = True
    centres, rows = share_rows(table, own, alone)
    assert centres.shape == (size, 3) and rows.shape == (count,) and centres.isfinite().all()
    for row in np.flatnonzero(alone):
        assert np.flatnonzero(rows == row).tolist() == [own[row]]
        assert torch.equal(centres[row], table[own[row]])
    free = ~np.isin(np.arange(count), own[alone])
    distances = torch.cdist(table[free].double(), centres.double())
    distances[:, alone] = torch.inf
    chosen = distances[torch.arange(len(distances)), torch.from_numpy(rows[free])]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-4, atol=1e-5)


def test_a_shared_row_is_the_mean_of_its_tokens():
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    near = torch.tensor([[0.0, 0.0], [0.5, 0.1], [-0.2, 0.3]])
    table = (places[:, None] + near).flatten(0, 1)
    centres, rows = share_rows(table, np.array([0, 3, 6]), np.zeros(3, dtype=bool))
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(centres, places + near.mean(0))


def test_a_tokenizer_in_which_tokens_share_an_id(wordpiece_file, tmp_path):
    ids = word_pieces(wordpiece_file)
    renumber(wordpiece_file, {**ids, "cat": ids["dog"]}, tmp_path / "tokenizer.json")
    shared = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (
        shared.encode("red cat").ids
        == shared.encode("red dog").ids
        == Tokenizer.from_file(str(wordpiece_file)).encode("red dog").ids
    )
    assert shared.encode("red cat").tokens == ["[CLS]", "red", "cat", "[SEP]"]


def test_placeholders_of_a_vocabulary_are_left_out(wordpiece_file, tmp_path):
    tree = json.loads(wordpiece_file.read_text())
    size = len(tree["model"]["vocab"])
    tree["model"]["vocab"] |= {"[unused1]": size, "[unused2]": size + 1}
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": size + 1, "content": "[unused2]"})
    (tmp_path / "t.json").write_text(json.dumps(tree))
    assert list(word_pieces(tmp_path / "t.json").values()) == [*range(size), size + 1]  # one is in use


def test_an_encoder_starts_with_the_teachers_weights_and_trains_on():
    teacher, student = ConvNet(widths=[4, 8], blocks=[0, 1]).train(), ConvNet(widths=[4, 8], blocks=[0, 1], dropout=0.5)
    teacher({"image": images()})  # its batch statistics move
    encoder_weights(encoder=teacher, student=student)
    torch.testing.assert_close(student.state_dict(), teacher.state_dict())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    with pytest.raises(UserError, match=r"not built as the teacher's: size mismatch for stages\.1"):
        encoder_weights(encoder=teacher, student=ConvNet(widths=[4, 6], blocks=[0, 1]))


def test_reducing_the_width_keeps_the_strongest_directions():
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(200, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 10, generator=generator, dtype=torch.float64
    )
    table = (strong + 0.01 * torch.randn(200, 10, generator=generator, dtype=torch.float64)).float()
    reduced = reduce_width(table, 2, rarity_weight=False)
    assert reduced.shape == (200, 2) and reduced.dtype == torch.float32
    assert reduced.std().item() == pytest.approx(1, rel=1e-5)
    centred = table - table.mean(0)
    distances = [torch.pdist(x) for x in (centred, reduced)]
    assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.999
    assert reduced[:, 0].var() > reduced[:, 1].var()


def test_rarity_scales_rows_by_their_rank():
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    plain, weighted = reduce_width(table, 3, rarity_weight=False), reduce_width(table, 3)
    ratio = (weighted / plain)[:, 0]
    ranks = torch.log1p(torch.arange(1, 51))
    torch.testing.assert_close(ratio / ratio[0], ranks / ranks[0], rtol=1e-4, atol=1e-5)


def test_a_table_cannot_become_wider_than_the_tower():
    with pytest.raises(UserError, match="cannot inherit 20-wide embeddings from 16-wide ones"):
        reduce_width(torch.randn(30, 16), 20)


def test_a_student_beside_a_byte_pair_teacher_reads_words_of_its_own(clip_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_rows(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    text = f"{{type: pretrained_text, weights: 'path:{clip_folder}', max_length: 12}}"
    changes = [f"teacher.encoders.text={text}", "student.inherit={}"]
    changes += [f"{model}.train.max_steps=2" for model in ("teacher", "student")]
    answer = distill("train", "recipe.yaml", *changes)
    assert answer.code == 0, answer.err
    model = read_json(tmp_path / "runs/tiny/vocabulary/tokenizer.json")["model"]
    assert model["type"] == "WordPiece" and {"red", "moon", "big"} <= model["vocab"].keys()
    changes[1] = "student.inherit={text: {type: token_embeddings}}"  # the teacher's tokens are no words
    assert "only WordPiece vocabularies can be reduced" in refusal(distill("train", "recipe.yaml", *changes))
