"Texts, tokens, words and letter lines."

import builtins
import copy
import importlib.util
import json
import re
import sys
import time
from functools import cache
from string import ascii_uppercase
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from atm_sae.data import letters, text
from atm_sae.data.letters import (
    LineConfig,
    answer_tokens,
    letter_lines,
    mixed_tokens,
    word_probabilities,
    word_vocabulary,
)
from atm_sae.data.text import (
    bos_eos,
    checked_texts,
    docs_checksum,
    documents_checksum,
    encode_inside,
    encode_texts,
    open_documents,
    pack_tokens,
    python_docs,
    python_docs_by_package,
    read_texts,
    special_ids,
    stream_dataset,
    text_checksum,
    token_counts,
    token_stream,
    token_texts,
    train_tokenizer,
)
from atm_sae.evals.first_letter import find_words, first_letter_prompts
from atm_sae.evals.probing import token_rows, unique_texts


@pytest.fixture(scope="module")
def docs():
    return python_docs()


@pytest.fixture(scope="module")
def tok(docs):
    return train_tokenizer(docs[:600], vocab_size=1024, letters=2000)


@pytest.fixture(scope="module")
def vocab(tok):
    return word_vocabulary(tok)


@pytest.fixture(scope="module")
def counts(tok, docs):
    return token_counts(tok, docs[:600])


def decoded_lines(tok, row):
    return tok.decode(row[1:]).split("\n")[1:-1]  # the last line may be cut


# ---- sources


def test_docs_are_large_and_stable(docs):
    assert len(docs) > 3000 and sum(map(len, docs)) > 1_000_000
    assert docs == python_docs() and all(d.strip() for d in docs)
    assert len(docs_checksum()) == 64


def test_docs_by_package_hold_the_same_docstrings(docs):
    groups = python_docs_by_package()
    assert {"json", "email", "argparse"} <= set(groups)
    assert sum(map(len, groups.values())) == len(docs) - len(text.help_topics())
    assert not {"test", "idlelib", "site-packages"} & set(groups)


def test_docs_returns_a_fresh_list(docs):
    python_docs().clear()
    assert len(python_docs()) == len(docs)


def test_docstrings_of_broken_source_are_none():
    assert text._docstrings(b"def f(:") == [] and text._docstrings(b"\x00") == []


def test_python_without_sources_is_named(monkeypatch):
    monkeypatch.setattr(text, "stdlib_files", lambda: [])
    with pytest.raises(ValueError, match="pass your own texts"):
        text._stdlib_docs.__wrapped__()


def test_text_checksum_knows_borders_and_order():
    assert text_checksum(["a", "b"]) == text_checksum(iter(["a", "b"]))
    assert len({text_checksum(t) for t in (["a", "b"], ["b", "a"], ["ab"], ["ab", ""])}) == 4


def test_read_texts(tmp_path):
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "c.csv").write_text("not read")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    assert read_texts(tmp_path) == ["first", "second", "two\nlines"]
    assert read_texts(tmp_path / "b.txt") == ["two\nlines"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": 1', "line 1: not JSON"),
        ('{"other": "x"}', "line 1: no field 'text'"),
        ("[1]", "line 1: no field"),
        ('{"text": "one"}\n"text"', "line 2: no field"),
        ('{"text": "one"}\n\n{"text": null}', r"line 3: the field 'text' is None \(NoneType\)"),
        ('{"text": 5}', r"line 1: the field 'text' is 5 \(int\), not a text"),
        ('{"text": ["a"]}', r"line 1: the field 'text' is \['a'\] \(list\), not a text"),
        ('{"text": "a\\ud800b"}', r"line 1: .* half a surrogate pair \(character 2\)"),
        ("", "no text"),
        (" \n\n", "no text"),
    ],
)
def test_read_texts_names_file_and_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as e:
        read_texts(tmp_path / "a.jsonl")
    assert "a.jsonl" in str(e.value)


def test_read_texts_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_texts(tmp_path / "nothing")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_have_no_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("déjà", encoding=encoding)
    (tmp_path / "b.jsonl").write_text('{"text": "vu"}\n{"text": "là"}', encoding=encoding)
    assert read_texts(tmp_path) == ["déjà", "vu", "là"]


def test_files_of_another_encoding_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ndéjà".encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "vu"}\n{"text": "l\xe0"}')
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(ValueError, match=rf"{name}, line 2: byte 0xe"):
            read_texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.jsonl.gz", "A.ZIP"])
def test_files_of_another_format_are_refused(tmp_path, name):
    (tmp_path / name).write_text('{"text": "one"}')
    with pytest.raises(ValueError, match=rf"{name}: .* files are not read; write .*\.jsonl"):
        next(open_documents(str(tmp_path / name)))
    with pytest.raises(ValueError, match="no text in .*: expected .txt or .jsonl files"):
        documents_checksum(str(tmp_path))


def test_folders_and_capital_endings(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    (tmp_path / "notes.txt" / "A.TXT").write_text("one")
    (tmp_path / "B.JSONL").write_text('{"text": "two"}')
    (tmp_path / "empty.txt").touch()
    assert read_texts(tmp_path) == ["two", "one"]
    assert documents_checksum(str(tmp_path)) == documents_checksum(str(tmp_path))


@pytest.mark.parametrize(
    "texts, message",
    [
        ("one string", r"texts is one string, where a list .*: write \[text\]"),
        (["a", None], r"texts\[1\] is None \(NoneType\), not a text"),
        ([b"a"], r"texts\[0\] is b'a' \(bytes\), not a text"),
        (["a", "b\udc80"], r"texts\[1\] holds half a surrogate pair \(character 2\)"),
    ],
)
def test_texts_that_are_none_are_named(tok, texts, message):
    for read in (
        text_checksum,
        lambda texts: [*checked_texts(texts)],
        lambda texts: pack_tokens(tok, texts, 4),
        lambda texts: token_counts(tok, texts),
        lambda texts: token_rows(tok, texts),
        lambda texts: encode_inside(tok, texts, "A"),
    ):
        with pytest.raises(ValueError, match=message):
            read(texts)
    with pytest.raises(ValueError, match=re.escape("docs['x']")):
        unique_texts({"x": texts})


def test_no_texts_have_no_tokens(tok):
    assert encode_texts(tok, []) == [] and pack_tokens(tok, [], 4).shape == (0, 4)


def test_stream_dataset_without_datasets(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'atm-sae\[data\]'"):
        next(stream_dataset("some/set"))


def test_stream_dataset_reads_a_column(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(path, name, split, streaming, revision):
            return iter([{"text": str(i)} for i in range(5)])

    real = builtins.__import__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: Fake if name == "datasets" else real(name, *a, **k),
    )
    assert list(stream_dataset("x", limit=2)) == ["0", "1"] and len(list(stream_dataset("x"))) == 5
    with pytest.raises(ValueError, match="no field 'body'; it has: text"):
        next(stream_dataset("x", column="body"))


@pytest.mark.parametrize("value, kind", [(None, "NoneType"), (3.5, "float")])
def test_a_row_without_a_text_is_named(tmp_path, value, kind):
    pytest.importorskip("datasets")
    (tmp_path / "some" / "set").mkdir(parents=True)
    rows = [dict(text="one", other="a"), dict(text="two", other=None), dict(text="x", other="b")]
    rows = [row | (dict(other=value) if value else {}) for row in rows]
    (tmp_path / "some" / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = stream_dataset("some/set", column="other", source=tmp_path, start=1)
    with pytest.raises(ValueError, match=rf"some/set, row 1: the field 'other' is .* \({kind}\)"):
        next(stream)


def test_the_extra_data_reads_zstandard(tmp_path):
    "The Pile is stored so; `datasets` alone does not bring what unpacks it."
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "some" / "set").mkdir(parents=True)
    (tmp_path / "some" / "set" / "train.jsonl.zst").write_bytes(
        zstandard.compress(b'{"text": "A first."}\n{"text": "A second."}\n')
    )
    assert list(stream_dataset("some/set", source=tmp_path, start=1)) == ["A second."]


# ---- tokenizer and words


def test_tokenizer_has_all_answers_and_is_reproducible(tok, docs):
    assert all(len(tok(f" {c}")["input_ids"]) == 1 for c in "AZQX")
    assert (tok.pad_token_id, tok.eos_token_id, tok.bos_token_id) == (0, 1, 2)
    assert train_tokenizer(docs[:600], vocab_size=1024, letters=2000).get_vocab() == tok.get_vocab()
    assert tok.decode(tok("Round trip: été")["input_ids"]) == "Round trip: été"


def test_every_word_is_letters_and_one_token(tok, vocab):
    assert list(vocab.columns) == ["token_id", "text", "letter"] and len(vocab) > 500
    for row in vocab.itertuples():
        assert re.fullmatch(" ?[A-Za-z]+", row.text) and row.letter == row.text.strip()[0].upper()
    assert tok(list(vocab.text))["input_ids"] == [[i] for i in vocab.token_id]


def test_special_tokens_are_no_words(tok, vocab):
    assert not set(tok.all_special_ids) & set(vocab.token_id)


def test_tokenizer_without_words():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    digits = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
    )
    with pytest.raises(ValueError, match="a tokenizer without word tokens"):
        word_vocabulary(digits)
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        pack_tokens(digits, ["1 2"], 4)


# ---- tokenizers that write a space as ▁


@cache
def spaced(style):
    "A tokenizer that keeps the space in the token as SentencePiece does, by where it adds one."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    scheme = style if style in ("first", "always", "never") else "always"
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    answers = "".join(f" {c}" for c in ascii_uppercase) * 2000
    texts = [*python_docs()[:600], answers + " has the first letter:" * 500]
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    special = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if style in ("llama", "gemma"):  # they replace spaces before the model, and split nothing
        to_mark = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if style == "llama":
            to_mark = normalizers.Sequence([normalizers.Prepend("▁"), to_mark])
            steps.append(decoders.Strip(" ", 1, 0))
        bpe.normalizer, bpe.decoder = to_mark, decoders.Sequence(steps)
        bpe.pre_tokenizer = pre_tokenizers.Split("\0", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


each_style = pytest.mark.parametrize("style", ["first", "always", "never", "llama", "gemma"])


@each_style
def test_a_token_has_its_own_leading_space(style):
    tokenizer = spaced(style)
    entries = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert token_texts(tokenizer)[3:] == [entry.replace("▁", " ") for entry in entries[3:]]


@each_style
def test_words_are_found_with_and_without_a_leading_space(style):
    tokenizer = spaced(style)
    words = word_vocabulary(tokenizer)
    space = words.text.str.startswith(" ")
    assert space.sum() > 300 and (~space).sum() > 300
    entries = tokenizer.convert_ids_to_tokens(list(words.token_id))
    assert [e.replace("▁", " ") for e in entries] == list(words.text)
    words = words[:200]
    prompts, ends = first_letter_prompts(words, n_icl=3)
    tokens, at, found = find_words(tokenizer, prompts, ends, words.token_id)
    assert found.float().mean() > 0.95
    assert tokens[torch.arange(len(at)), at].tolist() == words.token_id[found.numpy()].tolist()


@each_style
def test_answers_are_26_different_tokens(style):
    tokenizer = spaced(style)
    entries = tokenizer.convert_ids_to_tokens(answer_tokens(tokenizer))
    assert entries == [f"▁{c}" for c in ascii_uppercase]


@each_style
@pytest.mark.parametrize("kind", ["has_letter", "word_colon"])
def test_letter_lines_are_what_the_tokenizer_makes_of_them(style, kind):
    tokenizer = spaced(style)
    vocabulary = word_vocabulary(tokenizer)
    config = LineConfig(**{"has_letter": 0, "word_colon": 0, "lists": 0, kind: 1.0})
    rows = letter_lines(tokenizer, vocabulary, np.ones(len(tokenizer)), 8, 64, config)
    texts, newline = token_texts(tokenizer), encode_inside(tokenizer, ["\n"], before=" A")[0][0]
    whole = [row[: 63 - row[::-1].index(newline)] for row in rows[:, 1:].tolist()]  # whole lines
    lines = ["".join(texts[i] for i in row) for row in whole]
    assert encode_inside(tokenizer, lines, before=" A") == whole


def test_a_token_across_the_border_has_no_place_inside():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"A": 0, ":": 1, "A:": 2, "\n": 3, "a": 4}
    bpe = Tokenizer(models.BPE(vocabulary, [("A", ":")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="\n")
    assert encode_inside(tokenizer, [":", "a"], before="A") == [[], [4]]
    assert encode_inside(tokenizer, ["A:"], before="a") == [[2]]


# ---- packing


def test_pack_by_hand(tok):
    a, b = (tok(t)["input_ids"][0] for t in (" A", " B"))
    assert token_stream(tok, [" A A A", " B B"]).tolist() == [a, a, a, 1, b, b, 1]
    assert pack_tokens(tok, [" A A A", " B B"], 4).tolist() == [[2, a, a, a], [2, 1, b, b]]
    assert pack_tokens(tok, [" A"], 8).shape == (0, 8)
    with pytest.raises(ValueError, match="at least 2"):
        pack_tokens(tok, [" A"], 1)


def rows_of(tokenizer):
    "Rows of tokens, by each function that makes some."
    words = word_vocabulary(tokenizer)[:50]
    prompts, ends = first_letter_prompts(words, n_icl=2)
    return dict(
        documents=pack_tokens(tokenizer, python_docs()[:5], 16),
        mixture=mixed_tokens(tokenizer, 2000, 16, texts=python_docs()[:20]),
        prompts=find_words(tokenizer, prompts, ends, words.token_id)[0],
        probing=torch.tensor([row[:5] for row in token_rows(tokenizer, python_docs()[:5])]),
    )


@pytest.mark.parametrize("missing, start", [("bos_token", 1), ("eos_token", 2), ("pad_token", 2)])
def test_all_rows_have_the_same_start(tok, missing, start):
    other = copy.deepcopy(tok)
    setattr(other, missing, None)
    for name, rows in rows_of(other).items():
        assert (rows[:, 0] == start).all() and (rows[:, 1] > 2).any(), name


def test_all_rows_need_a_start(tok):
    other = copy.deepcopy(tok)
    other.bos_token = other.eos_token = None
    words = word_vocabulary(other)[:20]
    prompts, ends = first_letter_prompts(words, n_icl=2)
    for make in (
        lambda: pack_tokens(other, ["a b"], 4),
        lambda: token_rows(other, ["a b"]),
        lambda: find_words(other, prompts, ends, words.token_id),
    ):
        with pytest.raises(ValueError, match="neither a BOS nor an EOS.*tokenizer_config.json"):
            make()


def test_bos_and_eos_stand_once_whatever_text_and_tokenizer_add(tok):
    from tokenizers import processors

    other = copy.deepcopy(tok)
    plain = tok(" A B")["input_ids"]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    assert other(" A B")["input_ids"] == [2, *plain, 1]
    for texts in ([" A B"], ["<bos> A B<eos>"], ["<bos><bos> A B<eos>"]):
        assert encode_texts(other, texts) == [plain]
        assert token_stream(other, texts).tolist() == [*plain, 1]
        assert pack_tokens(other, texts, 1 + len(plain)).tolist() == [[2, *plain]]
        assert token_rows(other, texts) == [[2, *plain]]
    assert encode_texts(other, ["<eos>", "<eos><bos>", "", "<bos>A<bos>"]) == [
        *([[]] * 3),
        *encode_texts(other, ["A"]),
    ]


@pytest.mark.parametrize("texts", [[" A<eos> B"], [" A <bos> B"], ["A<pad>"], ["<pad> A"]])
def test_special_tokens_spelled_in_a_text_are_text(tok, texts):
    "A document that writes about tokens stays one document, with all of its characters."
    (ids,) = encode_texts(tok, texts)
    assert min(ids) > 2 and [tok.decode(ids)] == texts
    assert (token_stream(tok, texts) == 1).sum() == 1 and token_counts(tok, texts)[:3].sum() == 0
    assert pack_tokens(tok, texts, 1 + len(ids)).tolist() == [[2, *ids]]
    assert token_rows(tok, texts) == [[2, *ids]]


def test_added_tokens_that_are_not_special_stay_tokens(tok):
    from tokenizers import AddedToken

    other = copy.deepcopy(tok)
    other.add_tokens([AddedToken("reserved", special=True), AddedToken("ordinary", special=False)])
    (ids,) = encode_texts(other, ["ordinary reserved"])
    assert ids[0] == len(tok) + 1 and len(tok) not in ids
    rows, at, found = find_words(other, ["A reserved B"], [0], encode_texts(tok, ["A"])[0])
    assert found.all() and len(tok) not in rows and at.tolist() == [1]


def test_a_tokenizer_without_bos_and_eos_encodes(tok):
    other = copy.deepcopy(tok)
    other.bos_token = other.eos_token = None
    assert encode_texts(other, [" A B"]) == encode_texts(tok, [" A B"])


def test_a_slow_tokenizer_keeps_its_added_tokens(tmp_path):
    "It would split these too; a special token inside a text stays one there."
    from tokenizers import AddedToken
    from transformers import CanineTokenizer

    slow = CanineTokenizer()
    slow.add_tokens([AddedToken("ordinary", special=False)])
    (ids,) = encode_texts(slow, ["ordinary A"])
    assert ids == [slow.convert_tokens_to_ids("ordinary"), ord(" "), ord("A")]


def test_special_tokens_without_a_role_are_special(tok):
    from tokenizers import AddedToken

    other = copy.deepcopy(tok)
    other.add_tokens([AddedToken("reserved", special=True), AddedToken("ordinary", special=False)])
    assert special_ids(other) == [0, 1, 2, len(tok)] and special_ids(tok) == [0, 1, 2]
    other.bos_token = None
    assert special_ids(other) == [0, 1, 2, len(tok)] and bos_eos(other) == (1, 1)
    words = word_vocabulary(other)
    assert "reserved" not in set(words.text) and "ordinary" in set(words.text)


def test_counts(tok):
    c = token_counts(tok, [" A A", " B"])
    assert c.shape == (len(tok),) and c.sum() == 3 and c[tok(" A")["input_ids"][0]] == 2


# ---- letter lines


def test_probabilities_by_hand():
    assert np.allclose(word_probabilities([8, 2, 0]), [0.66, 0.24, 0.1])
    assert np.allclose(word_probabilities([9, 1], alpha=0.5, uniform=0), [0.75, 0.25])  # 3 : 1
    assert np.allclose(
        word_probabilities([5, 5, 0], alpha=0, uniform=0), [0.5, 0.5, 0]
    )  # unseen words stay unseen
    assert np.allclose(word_probabilities([0, 0]), [0.5, 0.5])


@pytest.mark.parametrize(
    "bad", [dict(lists=0.5), dict(has_letter=-0.2, lists=1.0), dict(uniform=1.5)]
)
def test_line_config_is_checked(bad):
    with pytest.raises(ValueError, match="LineConfig"):
        LineConfig(**bad)


@pytest.mark.parametrize(
    "kind, pattern",
    [
        ("has_letter", r"( ?[A-Za-z]+) has the first letter: ([A-Z])"),
        ("word_colon", r"( ?[A-Za-z]+): ([A-Z])"),
    ],
)
def test_word_lines_tell_the_truth(tok, vocab, counts, kind, pattern):
    config = LineConfig(**{"has_letter": 0, "word_colon": 0, "lists": 0, kind: 1.0})
    rows = letter_lines(tok, vocab, counts, 20, 64, config)
    assert rows.shape == (20, 64) and rows.dtype == torch.int64 and (rows[:, 0] == 2).all()
    lines = [line for row in rows for line in decoded_lines(tok, row)]
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert len(lines) > 50 and all(m and m[1].strip()[0].upper() == m[2] for m in matches)


def test_lists_hold_words_of_their_letter(tok, vocab, counts):
    rows = letter_lines(tok, vocab, counts, 40, 64, LineConfig(has_letter=0, word_colon=0, lists=1))
    lines = [line for row in rows for line in decoded_lines(tok, row)]
    for line in lines:
        letter, words = line.split(":")
        words = re.findall("[ ,][A-Za-z]+", words)
        assert (
            "".join(words) == line[2:]
            and 4 <= len(words) <= 8
            and all(w[1].upper() == letter for w in words)
        )
    assert len({line[0] for line in lines}) > 15


def test_list_words_are_single_tokens(tok, vocab, counts):
    rows = letter_lines(tok, vocab, counts, 10, 64, LineConfig(has_letter=0, word_colon=0, lists=1))
    comma, newline, colon = (tok(c)["input_ids"][0] for c in ",\n:")
    heads = {tok(c)["input_ids"][0] for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert set(rows[:, 1:].flatten().tolist()) <= set(vocab.token_id) | heads | {
        comma,
        newline,
        colon,
    }


def test_list_letters_follow_the_square_root(tok, vocab, counts):
    rows = letter_lines(
        tok, vocab, counts, 1500, 128, LineConfig(has_letter=0, word_colon=0, lists=1)
    )
    p = word_probabilities(counts[vocab.token_id])
    mass = np.array([p[vocab.letter == c].sum() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"])
    heads = [tok(c)["input_ids"][0] for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    first = rows[:, 2]  # BOS, newline, letter
    seen = np.array([(first == h).float().mean() for h in heads])
    assert np.abs(seen - np.sqrt(mass) / np.sqrt(mass).sum()).max() < 0.03


def test_kinds_come_in_their_shares(tok, vocab, counts):
    rows = letter_lines(
        tok, vocab, counts, 2000, 16, LineConfig(has_letter=0.5, word_colon=0.5, lists=0)
    )
    has = tok(" has the first letter:")["input_ids"]
    share = (rows[:, 3 : 3 + len(has)] == torch.tensor(has)).all(1).float().mean()
    assert abs(share - 0.5) < 0.05


def test_letter_lines_seed_speed_and_bounds(tok, vocab, counts):
    began = time.perf_counter()
    rows = letter_lines(tok, vocab, counts, 2000, 128)
    assert time.perf_counter() - began < 1
    assert torch.equal(rows, letter_lines(tok, vocab, counts, 2000, 128)) and not torch.equal(
        rows, letter_lines(tok, vocab, counts, 2000, 128, seed=1)
    )
    assert letter_lines(tok, vocab, counts, 0, 16).shape == (0, 16) and letter_lines(
        tok, vocab, counts, 1, 8
    ).shape == (1, 8)
    with pytest.raises(ValueError, match="at least 8"):
        letter_lines(tok, vocab, counts, 1, 7)


def test_letters_must_be_tokens(docs):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        docs[:20],
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<eos>"],
            show_progress=False,
        ),
    )
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    with pytest.raises(ValueError, match="splits .* tokens, or joins them; letter lines"):
        letter_lines(plain, word_vocabulary(plain), token_counts(plain, docs[:20]), 1, 16)


# ---- mixture


@pytest.mark.parametrize("sizes", [(300, 700), (1, 999), (50, 50), (0, 5), (5, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_any_end_of_the_order_holds_each_kind_in_its_share(sizes, seed):
    """Each kind has one row in each of its equal steps from 0 to 1, so from any point on its rows
    are less than one off its share. In the last m rows of both kinds, with shares s and 1 - s and
    errors a and b, that leaves s m + (1 - s) a - s b: again less than one row off."""
    order = letters.spread_evenly(sizes, torch.Generator().manual_seed(seed))
    assert order.sort().values.tolist() == [*range(sum(sizes))]
    last = (order.flip(0) >= sizes[0]).cumsum(0) - torch.arange(1, sum(sizes) + 1) * (
        sizes[1] / sum(sizes)
    )
    assert last.abs().max() < 1


def test_rows_of_one_kind_are_shuffled():
    order = letters.spread_evenly((500, 500), torch.Generator().manual_seed(0))
    for kind in (order[order < 500], order[order >= 500] - 500):
        assert (
            len({*kind.tolist()}) == 500 and abs(np.corrcoef(kind, np.arange(500))[0, 1]) < 0.2
        )  # 4.5 standard deviations


def test_mixture_shape_share_and_seed(tok, docs):
    def make(**more):
        return mixed_tokens(tok, 4000, 32, texts=docs[:300], **more)

    rows = make()
    assert rows.shape == (125, 32) and (rows[:, 0] == 2).all()
    assert torch.equal(rows, make()) and not torch.equal(rows, make(seed=1))
    newline = tok("\n")["input_ids"][0]
    assert (make(line_share=1.0)[:, 1] == newline).all()
    lines = (
        mixed_tokens(
            tok, 4000, 32, line_share=0.4, texts=[t.replace("\n", " ") for t in docs[:300]]
        )[:, 1]
        == newline
    )  # no document begins so
    assert lines.sum() == 50 and all(
        abs(lines[i:].sum().item() - 0.4 * len(lines[i:])) < 1 for i in range(125)
    )
    assert (make(line_share=0.0)[:, 1] == newline).float().mean() < 0.3


def test_mixture_rereads_short_texts_from_another_place(tok, docs):
    rows = mixed_tokens(tok, 8000, 32, line_share=0.0, texts=docs[:10])
    assert (
        rows.shape == (250, 32)
        and len({tuple(r.tolist()) for r in rows}) > len(token_stream(tok, docs[:10])) // 31
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(line_share=2), "line_share"),
        (dict(n_tokens=0), "n_tokens"),
        (dict(texts=["short"]), "too few for rows"),
    ],
)
def test_mixture_bad_input(tok, docs, bad, message):
    with pytest.raises(ValueError, match=message):
        mixed_tokens(tok, **{"n_tokens": 1000, "context": 64, "texts": docs[:20], **bad})


def test_a_million_tokens(tok):
    assert mixed_tokens(tok, 1_000_000).shape == (7813, 128)


def test_a_data_set_of_the_hub_is_read_at_its_commit(monkeypatch):
    text._commit.cache_clear()
    asked = []

    def info(dataset, revision):
        asked.append((dataset, revision))
        return SimpleNamespace(sha="c0ffee")

    def stream(dataset, start, revision):
        return iter([f"{dataset} {start} {revision}"])

    monkeypatch.setattr("huggingface_hub.dataset_info", info)
    monkeypatch.setattr(text, "stream_dataset", stream)
    assert text.documents_checksum("me/pile@v2") == "me/pile@c0ffee"
    assert [*text.open_documents("me/pile@v2", 3)] == ["me/pile 3 c0ffee"]
    assert asked == [("me/pile", "v2")]
    text._commit.cache_clear()


def test_a_data_set_that_cannot_be_asked_for_is_an_error(monkeypatch):
    def info(dataset, revision):
        raise ConnectionError("no route")

    text._commit.cache_clear()
    monkeypatch.setattr("huggingface_hub.dataset_info", info)
    with pytest.raises(Exception, match="me/none"):
        text.documents_checksum("me/none")


def test_a_row_holds_two_tokens_at_least(lm):
    with pytest.raises(ValueError, match="context"):
        text.PackedRows(lm.tokenizer, lambda n: iter(["a"]), 1)


def test_a_python_without_help_topics(monkeypatch):
    assert text.help_topics()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert text.help_topics() == []


def replaced(lm, share, seed=0):
    "Rows of 40 tokens that are not special, behind BOS."
    bos, _ = text.bos_eos(lm.tokenizer)
    ordinary = max(text.special_ids(lm.tokenizer)) + 1
    rows = torch.full((6, 41), ordinary)
    rows[:, 0] = bos
    return rows, text.ReplacedRows(text.TokenRows(rows), lm.tokenizer, share, seed)


def test_a_share_of_the_tokens_is_replaced_and_bos_is_not(lm):
    tokens, rows = replaced(lm, 0.25)
    found = rows.take(6)
    changed = found != tokens
    assert not changed[:, 0].any() and set(found[changed].tolist()) == {rows.by}
    assert rows.by in text.special_ids(lm.tokenizer)  # so it is no activation
    assert changed[:, 1:].float().mean() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(replaced(lm, 0.0)[1].take(6), tokens)
    assert not torch.equal(replaced(lm, 0.25, seed=1)[1].take(6), found)


def test_replaced_rows_do_not_depend_on_how_they_are_taken(lm):
    whole = replaced(lm, 0.5)[1].take(12)
    rows = replaced(lm, 0.5)[1]
    first = rows.take(5)
    again = replaced(lm, 0.5)[1]
    again.load_state_dict(rows.state_dict())
    assert torch.equal(torch.cat([first, again.take(7)]), whole)
    assert not torch.equal(whole[:6], whole[6:])  # a text that begins again is replaced anew


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(lm, share):
    with pytest.raises(ValueError, match="replaced is a share of the tokens"):
        replaced(lm, share)
