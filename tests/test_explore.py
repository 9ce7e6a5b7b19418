"The page on what SAEs absorb: its numbers, two SAEs, planted features, size, command, browser."

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from atm_sae.cli import main
from atm_sae.data.lm import read_site
from atm_sae.data.planted import PlantedWorld, WorldConfig
from atm_sae.data.synthsaebench import TreeWorld, TreeWorldConfig
from atm_sae.data.text import pack_tokens, special_ids
from atm_sae.evals.absorption import AbsorptionConfig, evaluate_absorption
from atm_sae.evals.constructed import absorbing_sae, letter_world, word_task
from atm_sae.evals.contexts import Passages, read_passages, top_contexts
from atm_sae.evals.first_letter import LETTERS
from atm_sae.report.explore import (
    N_BARS,
    Exploration,
    Item,
    Latent,
    Target,
    absorbing_latents,
    explore_letters,
    explore_page,
    explore_planted,
    write_explore_page,
)
from atm_sae.sae.sae import SAE, SAEConfig

WORLD = letter_world(30, 112)
TASK = word_task(WORLD, n=30, spread=0.0)
SAE_20 = absorbing_sae(WORLD, share=0.2)


@pytest.fixture(scope="module")
def explored():
    return explore_letters(SAE_20, TASK, "mask on")


@pytest.fixture(scope="module")
def passages():
    "A text of 60 tokens in 6 passages; latent 3 is largest on token 25, latent 30 is never active."
    x = torch.zeros(60, 112)
    x[[4, 14, 25, 26, 34, 44, 54]] = torch.tensor([2.0, 3, 9, 4, 5, 6, 7])[:, None] * child_of_d()
    words = [f" w{i}" for i in range(60)]
    words[26] = "\n<b>"
    return Passages(torch.arange(60), tuple(words), torch.arange(60) // 10, x, "a small text")


def child_of_d():
    "An activation on which latent 3, that of D, is active."
    row = int(
        np.flatnonzero((TASK.letter == 3).numpy() & (SAE_20.encode(TASK.x)[:, 3] > 0).numpy())[0]
    )
    return TASK.x[row]


@pytest.fixture(scope="module")
def dense():
    "An SAE with random weights, which has many more active latents than the page draws."
    torch.manual_seed(0)
    sae = SAE(SAEConfig(112, 150)).requires_grad_(False)
    sae.W_dec.mul_(torch.rand(150, 1) + 0.5)  # rows of several lengths
    return sae


def by_hand():
    "A world with directions at right angles, and an SAE that absorbs child 3 of parent 0."
    world = PlantedWorld(WorldConfig(d_in=9, n_parents=3, children_per_parent=2, n_free=0))
    world.directions = torch.eye(9)
    sae = SAE(SAEConfig(9, 9)).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(9))
    sae.W_enc[3, 0] = -10
    sae.W_dec.copy_(torch.eye(9))
    sae.W_dec[3, 0] = 1
    return sae, world


def data_of(page):
    "The data of a page."
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


# ---- letters


@pytest.mark.parametrize("which", ["constructed", "dense"])
def test_what_is_written_is_z_times_the_cosine(which, explored, dense):
    sae = dense if which == "dense" else SAE_20
    found = explore_letters(sae, TASK, "x") if which == "dense" else explored
    rows = {text: i for i, text in enumerate(TASK.words.text)}
    main = {target.name: target.main for target in found.targets}
    unit = F.normalize(sae.W_dec, dim=1)
    for item in found.items[::7]:
        x, p = TASK.x[rows[item.text]], TASK.directions[LETTERS.index(item.target)]
        q = (sae.encode(x[None])[0] * sae.W_dec.norm(dim=1) * (unit @ p)).numpy()
        assert item.A == pytest.approx(float(x @ p), abs=1e-5)
        largest = {int(j) for j in np.argsort(-np.abs(q))[:N_BARS] if q[j]}
        active = {j for j in main[item.target] if q[j]} | {*item.absorbing}
        assert {*item.written} == largest | active
        assert item.written == pytest.approx({j: q[j] for j in item.written}, abs=1e-3)
        assert list(item.written.values()) == sorted(item.written.values(), reverse=True)
        assert item.rest + sum(item.written.values()) == pytest.approx(q.sum(), abs=1e-3)
        assert item.n_rest + len(item.written) == (q != 0).sum()
    assert which == "constructed" or found.items[0].n_rest > 20


def test_absorbed_words_are_those_whose_letter_is_silent(explored):
    result = evaluate_absorption(SAE_20, TASK)
    assert [item.text for item in explored.items] == result.words.text.tolist()
    rows = {text: i for i, text in enumerate(TASK.words.text)}
    for item in explored.items:
        row = rows[item.text]
        z = SAE_20.encode(TASK.x[row][None])[0]
        assert item.full == float(z[TASK.letter[row]] == 0)
        child = 26 + int(TASK.letter[row]) * 30 + row % 30
        assert item.absorbing == ((child,) if item.full else ())
    assert sum(item.full for item in explored.items) == 30  # a fifth of 156 words
    assert explored.scores["full absorption"] == result.full
    assert explored.scores["absorption fraction"] == result.fraction
    assert explored.scores["L0 on the words"] == pytest.approx(1.8)
    by_letter = {t.name: (t.main, t.scores["F1"]) for t in explored.targets}
    letters = result.letters
    pairs = zip(letters.main_latents.map(tuple), letters.k_sparse_f1)
    assert by_letter == dict(zip(letters.first_letter, pairs))


def test_a_latents_words_and_cosines(explored):
    item = next(item for item in explored.items if item.full)
    (child,), letter = item.absorbing, LETTERS.index(item.target)
    latent = explored.latents[child]
    assert latent.rate == 1 / len(TASK.words) and list(latent.top) == [item.text]
    row = TASK.words.index[TASK.words.text == item.text][0]
    z = SAE_20.encode(TASK.x[row][None])[0, child] * SAE_20.W_dec[child].norm()
    assert latent.top[item.text] == pytest.approx(float(z), abs=1e-3)
    cosines = F.normalize(SAE_20.W_dec, dim=1) @ TASK.directions.T
    assert latent.cosines == pytest.approx(dict(zip(LETTERS, cosines[child].tolist())), abs=1e-5)
    own = explored.latents[letter]  # active on the letter's words that are not absorbed
    assert len(own.top) == 10 and own.rate == 24 / len(TASK.words)
    assert all(text.startswith(item.target) for text in own.top)


def test_absorbing_latents_of_both_scores():
    q, cosines = (
        np.array([0.5, 1.0, 4.0, 2.0, -1.0, 0.7, 0.6]),
        np.array([0.2, 0.3, 0.05, 0.9, 0.5, 0.1, 0.4]),
    )
    latents = np.array([3, 5, 7, 9, 11, 13, 15])

    def found(full, fraction, **thresholds):
        config = AbsorptionConfig(**thresholds)
        return absorbing_latents(latents, q, cosines, [9], full, fraction, config)

    assert found(True, 0) == (7,)  # the cosine of 7 is too small for the fraction
    assert found(False, 0.2) == (5, 13, 15) and found(False, 0.2, absorbers=1) == (5,)
    assert found(True, 1) == (7, 5, 13, 15) and found(False, 0) == ()


def test_an_outlier_is_left_out_and_the_words_stay_in_order():
    "Latents of words are taken by their place among the ordinary words."
    task = replace(TASK, x=TASK.x.clone())
    task.x[3] *= 100
    found = explore_letters(SAE_20, task, "x")
    assert TASK.words.text[3] not in {item.text for item in found.items}
    z = SAE_20.encode(task.x[-1][None])[0]
    last = task.words.text.iloc[-1]
    best = int((z * SAE_20.W_dec.norm(dim=1)).argmax())
    assert last in found.latents[best].top


# ---- planted features


def test_a_planted_child_is_absorbed_or_not():
    sae, world = by_hand()
    found = explore_planted(sae, world, "by hand", n=3000)
    items = {item.text: item for item in found.items}
    assert list(items) == [f"child {i}" for i in range(3, 9)]
    assert {name for name, item in items.items() if item.full} == {"child 3"}
    absorbed, kept = items["child 3"], items["child 4"]
    assert absorbed.full == 1 and absorbed.absorbing == (3,) and kept.absorbing == ()
    assert 0 not in absorbed.written  # the parent's latent is zero
    # latent 3 has a row of length sqrt 2, at 45 degrees: it writes the child's mean coefficient
    assert absorbed.A == pytest.approx(1, abs=0.1) and absorbed.written[3] == pytest.approx(
        1, abs=0.1
    )
    assert kept.written[0] == pytest.approx(kept.A, abs=1e-5)  # the parent alone writes A
    first, second = found.targets[:2]
    assert first.main == (0,) and 0.4 < first.scores["absorbed"] < 0.8
    assert second.scores["absorbed"] == second.scores["miss rate"] == 0
    assert found.latents[3].cosines["parent 0"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert found.latents[0].rate < found.latents[4].rate + found.latents[0].rate < 0.2
    assert "parent 0 alone" in found.latents[0].top and "child 3" not in found.latents[0].top


def test_a_parent_without_a_latent_is_absorbed_everywhere():
    sae, world = by_hand()
    few = SAE(SAEConfig(9, 2)).requires_grad_(False)
    few.W_enc.copy_(sae.W_enc[:, 4:6])
    few.W_dec.copy_(sae.W_dec[4:6])
    found = explore_planted(few, world, "two latents", n=2000)
    assert all(target.main == () for target in found.targets)
    assert all(item.full == 1 for item in found.items)
    assert explore_page([found])


def test_a_world_without_parents_is_refused():
    world = PlantedWorld(WorldConfig(d_in=9, n_parents=0, n_free=9))
    with pytest.raises(ValueError, match="no parent features"):
        explore_planted(by_hand()[0], world, "x")


@pytest.mark.parametrize("world", [PlantedWorld, TreeWorld])
def test_features_are_named_by_their_kind(world):
    "Parents, children, and features that are neither; each direction has its own name."
    config = WorldConfig(d_in=30, n_parents=2, children_per_parent=2, n_free=3)
    if world is TreeWorld:
        config = TreeWorldConfig(n_features=10, d_in=30, n_roots=1, n_branches=2, depth=2)
    made = world(config)
    sae = SAE(SAEConfig(30, made.n_features)).requires_grad_(False)
    sae.W_enc.copy_(made.directions.T)
    sae.W_dec.copy_(made.directions)
    found = explore_planted(sae, made, "true directions", n=3000)
    for j, latent in found.latents.items():
        kind = "parent" if made.is_parent[j] else "child" if made.parent[j] >= 0 else "feature"
        best = max(latent.cosines, key=lambda name: latent.cosines[name])
        assert best == f"{kind} {j}" and latent.cosines[best] == pytest.approx(1, abs=1e-5)
    assert len(found.latents) > 5 and explore_page([found])


# ---- contexts


def test_contexts_of_latents(passages):
    found = top_contexts(SAE_20, passages)
    z = SAE_20.encode(passages.x) * SAE_20.W_dec.norm(dim=1)
    assert {*found} == {*z.any(0).nonzero()[:, 0].tolist()} and 3 in found
    assert found[3].rate == 7 / 60
    starts = [context.start for context in found[3].top]
    assert starts == [20, 50, 40, 30, 10]  # one for each passage, the largest five
    for context in found[3].top:
        values = z[context.start : context.start + len(context.z), 3].tolist()
        assert context.z == pytest.approx(values, abs=1e-4) and len(context.z) == 10
    assert max(found[3].top[0].z) == pytest.approx(float(z[25, 3]), abs=1e-4)


def test_a_context_is_a_part_of_a_long_passage_and_no_text_is_shown_twice(passages):
    one = replace(passages, number=torch.zeros(60, dtype=torch.long))
    (context,) = top_contexts(SAE_20, one)[3].top
    assert (context.start, len(context.z)) == (13, 19)  # 12 tokens before token 25, and 6 behind
    same = replace(passages, tokens=torch.arange(60) % 10)
    assert len(top_contexts(SAE_20, same)[3].top) == 1


def test_outliers_of_a_text_are_left_out(passages):
    sae = absorbing_sae(WORLD, share=0.2)
    sae.metadata = dict(max_norm=float(passages.x[25].norm()) * 0.9)
    found = top_contexts(sae, passages)
    assert found[3].rate == pytest.approx(6 / 59) and found[3].top[0].start == 50


def test_passages_of_a_model(lm):
    "Special tokens are left out and end passages; activations are those at the tokens."
    tokens = pack_tokens(lm.tokenizer, ["first words here", "second text"], 8)
    found = read_passages(lm, tokens, 1, source="two texts")
    special = torch.isin(tokens, torch.tensor(special_ids(lm.tokenizer)))
    assert found.tokens.tolist() == tokens[~special].tolist()
    x = read_site(lm, tokens, 1, "resid_post")[~special]
    assert torch.allclose(found.x, x.float(), atol=1e-5)
    groups = [len([*group]) for _, group in itertools.groupby(found.number.tolist())]
    runs = itertools.chain(*(itertools.groupby(row) for row in special.tolist()))
    assert groups == [len([*group]) for is_special, group in runs if not is_special]
    assert found.about == f"{len(found)} tokens of two texts"


def test_the_page_has_the_contexts_and_their_text_once(explored, passages):
    found = explore_letters(SAE_20, TASK, "with text", passages=passages)
    data = data_of(explore_page([found, replace(found, name="again")]))
    words, ids = data["tokens"]["texts"], data["tokens"]["ids"]
    assert [words[i] for i in ids] == list(passages.texts)
    *_, rate, contexts = data["saes"][0]["latents"]["3"]
    start, length, *pairs = contexts[0]
    assert (start, length, pairs[::2]) == (20, 10, [5, 6]) and rate == pytest.approx(
        7 / 60, abs=1e-4
    )
    assert "60 tokens of a small text" in found.about
    assert len(data["saes"][0]["latents"]["30"]) == 3  # active on words only
    with pytest.raises(ValueError, match="text differ"):
        explore_page([found, explored])


# ---- the page


def test_the_page_has_the_numbers(explored):
    page = explore_page([explored])
    found = data_of(page)
    (sae,) = found["saes"]
    for place, item in zip(found["items"], explored.items, strict=True):
        assert found["texts"][place[0]] == item.text and found["targets"][place[1]] == item.target
        assert place[2] == pytest.approx(item.A, rel=1e-3)
    full, fraction, n_rest, rest, absorbing, pairs = sae["items"][0]
    item = explored.items[0]
    assert (full, fraction, n_rest, rest) == (item.full, item.fraction, item.n_rest, item.rest)
    assert tuple(absorbing) == item.absorbing and pairs[::2] == list(item.written)
    assert pairs[1::2] == pytest.approx(list(item.written.values()), rel=1e-3)
    rate, top, cosines = sae["latents"][str(pairs[0])]
    latent = explored.latents[pairs[0]]
    assert [found["texts"][i] for i in top[::2]] == list(latent.top)
    assert cosines[1::2] == [round(100 * c) for c in latent.cosines.values()]
    assert rate == pytest.approx(latent.rate, rel=1e-3)
    assert sae["main"] == [[i] for i in range(26)]
    assert '<td class="num">0.192</td>' in page and "806" in page


def test_two_saes_and_a_floor(explored, dense):
    off = explore_letters(absorbing_sae(WORLD, share=0.5), TASK, "mask off")
    floor = explore_letters(dense, TASK, "random")
    page = explore_page([explored, off], floor)
    found = data_of(page)
    assert [sae["name"] for sae in found["saes"]] == ["mask on", "mask off"]
    absorbed = [sum(item[0] for item in sae["items"]) for sae in found["saes"]]
    assert absorbed == [sum(i.full for i in each.items) for each in (explored, off)]
    assert absorbed[0] < absorbed[1] and len(found["items"]) == len(explored.items)
    assert "floor: random" in page and "random" not in json.dumps(found)
    (row,) = re.findall(r'<th scope="row">full absorption</th>(.*?)</tr>', page)
    assert re.findall(">([^<]+)</td>", row) == ["0.192", "0.506", "+0.314", "0.00"]
    rates = [[target.scores["full"] for target in each.targets] for each in (explored, off)]
    apart = np.subtract(*reversed(rates))
    letter = LETTERS[int(apart.argmax())]
    (row,) = re.findall(rf'href="#target={letter}">{letter}</a></th>(.*?)</tr>', page, re.S)
    cells = [cell.strip() for cell in re.findall(r'<td class="num">(.*?)</td>', row, re.S)]
    assert float(cells[-2]) == pytest.approx(apart.max(), abs=1e-3) and apart.max() > 0.3
    assert explore_page([explored]).count(">difference<") == 0


def test_saes_that_were_measured_otherwise_are_refused(explored):
    small = explore_letters(SAE_20, word_task(WORLD, n=30, spread=0.0, seed=1), "other seed")
    with pytest.raises(ValueError, match="mask on and other seed .* seeds differ"):
        explore_page([explored, small])
    strict = explore_letters(SAE_20, TASK, "strict", AbsorptionConfig(share=0.5))
    with pytest.raises(ValueError, match="share differ"):
        explore_page([explored], floor=strict)
    with pytest.raises(ValueError, match="no SAE to show"):
        explore_page([])


def test_text_cannot_leave_its_place(explored):
    evil = "</script><script>alert(1)</script>"
    first = replace(explored.items[0], text=evil)
    page = explore_page([replace(explored, name=evil, items=(first, *explored.items[1:]))])
    assert page.count("</script>") == 2 and "<script>alert" not in page
    assert data_of(page)["saes"][0]["name"] == evil


def test_a_warning_about_the_layer_is_shown(explored):
    assert 'class="doubt"><strong>Notice' not in explore_page([explored])
    page = explore_page([replace(explored, notice="the model does not read the word")])
    assert page.count("the model does not read the word") == 1


def test_size_of_a_page_for_a_language_model(tmp_path):
    "4,096 latents and 6,300 words: below 5 MB."
    g = np.random.default_rng(0)
    words = [f" word{i}" for i in range(31_586)]
    q = g.normal(size=(6300, N_BARS)) * 3
    shown = g.integers(0, 4096, (6300, N_BARS)).tolist()
    items = tuple(
        Item(
            words[5 * i],
            LETTERS[i % 26],
            17.123,
            0.0,
            0.12345,
            (shown[i][0],),
            dict(zip(shown[i], q[i].tolist())),
            24,
            -0.12345,
        )
        for i in range(6300)
    )
    cosines, tops = g.normal(size=(4096, 26)) / 20, g.integers(0, len(words), (4096, 10))
    values = g.random((4096, 10)) * 40
    latents = {
        j: Latent(0.0123, dict(zip([words[i] for i in tops[j]], values[j].tolist())),
                  dict(zip(LETTERS, cosines[j].tolist())))
        for j in range(4096)
    }  # fmt: skip
    targets = tuple(Target(letter, (i,), {"F1": 0.5}) for i, letter in enumerate(LETTERS))
    one = Exploration("a", False, {}, "", {}, targets, items, latents)
    path = write_explore_page(tmp_path / "page.html", [one, replace(one, name="b")])
    assert path.stat().st_size < 5_000_000


# ---- the command


def test_explore_planted_from_the_shell(tmp_path, capsys):
    torch.manual_seed(0)
    SAE(SAEConfig(64, 80)).save(tmp_path / "one")
    SAE(SAEConfig(64, 70)).save(tmp_path / "two" / "sae")
    saes = [str(tmp_path / "one"), str(tmp_path / "two" / "sae")]
    out = tmp_path / "page.html"
    assert main(["explore", *saes, "--model", "planted", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = data_of(out.read_text(encoding="utf-8"))
    assert said["page"] == str(out) and list(said["scores"]) == ["one", "two"]
    assert found["terms"]["planted"] and [s["name"] for s in found["saes"]] == ["one", "two"]
    assert len(found["targets"]) == 20 and len(found["items"]) == 80


def test_ablation_and_contexts_from_the_shell(tmp_path, monkeypatch, capsys, passages):
    "Both SAEs are scored with the model, and their contexts come from one reading of one text."
    asked, read = [], []

    def scored(sae, latents, config, lm, protocol):
        asked.append(lm)
        result = evaluate_absorption(sae, latents, config, protocol=protocol)
        rate = dict(ablation_absorption_rate=0.25)
        return replace(result, letters=result.letters.assign(**rate))

    def held_out(data, lm, n):
        read.append((data.layer, n))
        return torch.zeros(1, 2)

    lm = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("atm_sae.evals.first_letter.get_tasks", lambda *of, **more: [TASK])
    monkeypatch.setattr("atm_sae.cli.load_model", lambda *of: lm)
    monkeypatch.setattr("atm_sae.report.explore.evaluate_absorption", scored)
    monkeypatch.setattr("atm_sae.data.batches.held_out_tokens", held_out)
    monkeypatch.setattr("atm_sae.evals.contexts.read_passages", lambda *of: passages)
    saes = [str(tmp_path / name) for name in ("one", "two")]
    for path in saes:
        SAE_20.save(path)
    args = ["--model", "a-model", "--layer", "5", "--ablation", "--context-tokens", "512"]
    out = tmp_path / "page.html"
    assert main(["explore", *saes, *args, "--out", str(out)]) == 0
    assert asked == [lm, lm] and read == [(5, 512)]
    page = out.read_text(encoding="utf-8")
    assert page.count(">ablation rate</th>") == 4  # scores, two SAEs, difference
    assert "<strong>ablation rate</strong> is the share of words" in page
    assert len(data_of(page)["tokens"]["ids"]) == 60


def test_a_trained_sae_of_a_tree_world_from_the_shell(cache, tmp_path, capsys):
    "The page has the world of the run: parents, children and their features."
    world = ["n_features=24", "d_in=20", "n_roots=2", "n_branches=3", "depth=1", "spread_steps=2"]
    sets = [part for pair in world for part in ("--set", pair)]
    train = ["--data", "planted:synthsaebench-16k", "--l0", "3", "--d-sae", "24", "--steps", "9"]
    assert main(["train", "topk", *train, *sets, "-q", "--out", str(tmp_path / "saes")]) == 0
    (sae,) = (tmp_path / "saes").iterdir()
    assert main(["explore", str(sae), "--out", str(tmp_path / "page.html")]) == 0
    found = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert found["targets"] == ["parent 0", "parent 1"] and len(found["items"]) == 6
    assert "feature 20" in found["directions"] and "child 3" in found["directions"]


def test_explore_letters_from_the_shell(tmp_path, monkeypatch, capsys):
    asked = {}

    def tasks(lm, layer, seeds, **settings):
        asked.update(settings, layer=layer, seeds=list(seeds))
        return [TASK]

    monkeypatch.setattr("atm_sae.evals.first_letter.get_tasks", tasks)
    lm = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("atm_sae.cli.load_model", lambda *of: lm)
    SAE_20.save(tmp_path / "mine")
    read = []
    monkeypatch.setattr("atm_sae.evals.contexts.read_passages", lambda *of: read.append(of))
    args = ["--model", "some-model", "--layer", "3", "--spaced", "--max-words", "900"]
    args += ["--context-tokens", "0"]
    out = tmp_path / "page.html"
    assert main(["explore", str(tmp_path / "mine"), *args, "--out", str(out)]) == 0
    assert asked == dict(layer=3, seeds=[0], site="resid_post", spaced=True, max_words=900)
    assert read == []
    assert f"{out}: 0.2 MB" in capsys.readouterr().out
    found = data_of(out.read_text(encoding="utf-8"))
    assert found["saes"][0]["name"] == "mine" and len(found["items"]) == 156


@pytest.mark.parametrize(
    "args, message",
    [
        (["{sae}", "{sae}", "{sae}"], "one or two SAEs, not 3"),
        (["{sae}", "--out", "{folder}"], "is a folder: name a file"),
        (["{sae}", "--model", "planted", "--spaced"], "the planted world has none"),
        (["{sae}", "--model", "planted", "--ablation"], "--ablation .* run a language model"),
        (["{sae}", "--model", "planted", "--context-tokens", "9"], "the planted world has none"),
        (["{sae}"], "give --model and --layer"),
        (["{folder}/none", "--model", "planted"], "none"),
    ],
)
def test_wrong_use(args, message, tmp_path, capsys):
    SAE(SAEConfig(64, 70)).save(tmp_path / "sae")
    given = [a.format(sae=tmp_path / "sae", folder=tmp_path) for a in args]
    assert main(["explore", *given]) != 0
    assert re.search(message, capsys.readouterr().err)


# ---- in a browser


@pytest.fixture(scope="module")
def two(passages):
    "Two SAEs on the same words and text."
    saes = {"mask on": SAE_20, "mask off": absorbing_sae(WORLD, share=0.5)}
    return [explore_letters(sae, TASK, name, passages=passages) for name, sae in saes.items()]


@pytest.fixture(scope="module")
def pages(tmp_path_factory, two):
    "Two SAEs on letters, and one on a planted world."
    folder = tmp_path_factory.mktemp("pages")
    planted = explore_planted(*by_hand(), "by hand", n=2000)
    made = dict(two=two, planted=[planted])
    return {name: write_explore_page(folder / f"{name}.html", of) for name, of in made.items()}


@pytest.fixture
def visit(browser, pages):
    "Opens a page; whatever goes wrong in it, or asks for a file, fails the test at its end."
    contexts, trouble = [], []

    def open_page(name="two", place="", width=1280, **more):
        context = browser.new_context(offline=True, viewport=dict(width=width, height=900), **more)
        contexts.append(context)
        page, own = context.new_page(), pages[name].as_uri()
        page.on("console", lambda m: trouble.append(m.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda r: trouble.extend([] if r.url == own else [r.url[:200]]))
        page.goto(own + place)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [t for t in trouble if not t.startswith("data:")] == []


def shown_bars(page, side):
    "{latent: q} of the bars of one SAE."
    rows = page.locator(f"#word-view .sides > div:nth-child({side}) tbody tr")
    cells = rows.evaluate_all("rows => rows.map(r => [r.cells[0].innerText, r.cells[2].innerText])")
    return {name: float(q.replace("−", "-")) for name, q in cells}


def test_bars_of_an_absorbed_word(visit, explored):
    item = max(explored.items, key=lambda item: (item.full, item.fraction, item.A))
    page = visit(place=f"#word={item.text}")
    bars, (child,) = shown_bars(page, 1), item.absorbing
    letter = LETTERS.index(item.target)
    assert list(bars) == ["A", str(child), str(letter), "bias and error"]
    assert bars["A"] == pytest.approx(item.A, rel=0.01) and bars[str(letter)] == 0
    assert bars[str(child)] == pytest.approx(item.written[child], rel=0.01)
    total = sum(q for name, q in bars.items() if name != "A")
    assert total == pytest.approx(item.A, abs=0.02)
    absorbing = page.locator(".fill.absorbing").first
    colour = absorbing.evaluate("e => getComputedStyle(e).backgroundColor")
    whole = page.locator(".fill.projection").first.bounding_box()["width"]
    assert colour == "rgb(213, 94, 0)"
    assert absorbing.bounding_box()["width"] / whole == pytest.approx(1, abs=0.05)
    assert page.locator("#latent").inner_text() == f"Latent {child} of mask on"


def test_a_deep_link_and_what_is_not_there(visit, explored):
    kept = next(item for item in explored.items if not item.full)
    page = visit(place=f"#word={kept.text}&sae=2&latent=3")
    assert page.locator("#word").inner_text() == f"Word: {kept.text}"
    assert page.locator("#latent").inner_text() == "Latent 3 of mask off"
    assert "Main latent of D." in page.locator("#latent-view").inner_text()
    assert page.locator("#latent-view tbody").nth(1).locator("tr").count() == 26
    page.evaluate("location.hash = '#word=xyzzy&latent=99999'")
    page.get_by_text("No such word on this page").wait_for()
    assert "no such latent" in page.locator("#latent-view").inner_text()


def test_contexts_in_the_page(visit):
    page = visit(place="#latent=3")
    rows = page.locator("#latent-view .contexts tbody tr")
    assert rows.count() == 5
    marks = rows.first.locator("mark")
    assert marks.all_inner_texts() == [" w25", "↵<b>"]
    largest = rows.first.locator("mark.largest")
    assert largest.all_inner_texts() == [" w25"]
    z = largest.get_attribute("title").removeprefix("z = ")
    assert rows.first.locator("td.num").inner_text() == z
    assert "w20 w21 w22 w23 w24 w25" in rows.first.inner_text()
    shares = marks.evaluate_all("m => m.map(e => Number(e.style.getPropertyValue('--share')))")
    assert shares[0] == 1 and 0.15 <= shares[1] < 0.6
    assert "of the 60 tokens" in page.locator("#latent-view").inner_text()
    page.evaluate("location.hash = '#latent=30'")
    page.get_by_text("Active on none of the 60 tokens").wait_for()


def test_a_letter_by_deep_link(visit):
    page = visit(place="#target=D")
    letters = page.locator("#words tbody td:nth-child(2)").all_inner_texts()
    assert {*letters} == {"D"} and page.locator("#target").input_value() == "D"
    assert page.evaluate("document.activeElement.id") == "worst"


def test_search_with_the_keyboard_alone(visit, explored):
    page = visit()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the search
    page.keyboard.press("Tab")
    if page.evaluate("document.activeElement.id") != "query":
        page.locator("#query").focus()
    text = explored.items[-1].text
    page.keyboard.type(text.lower())
    assert page.locator("#count").inner_text() == "1 found"
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.id === 'word'")
    assert page.locator("#word").inner_text() == f"Word: {text}"
    page.locator("#query").fill("30")
    found = page.locator("#found a").all_inner_texts()
    assert found[:2] == ["latent 30 of mask on", "latent 30 of mask off"]
    page.locator("#query").fill("s")
    assert page.locator("#found a").first.inner_text() == "letter S"
    page.locator("#found a").first.press("Enter")
    page.wait_for_function("document.activeElement.id === 'worst'")
    letters = page.locator("#words tbody td:nth-child(2)").all_inner_texts()
    assert {*letters} == {"S"} and page.locator("#target").input_value() == "S"


def test_the_table_of_letters_leads_to_latents_and_keeps_the_word(visit, explored):
    text = explored.items[-1].text
    page = visit(place=f"#word={text}")
    link = page.locator("section[aria-labelledby=targets] tbody tr").nth(4).get_by_role("link")
    assert link.all_inner_texts() == ["E", "4", "4"]
    link.nth(2).click()
    page.wait_for_function("document.activeElement.id === 'latent'")
    assert page.locator("#latent").inner_text() == "Latent 4 of mask off"
    assert page.locator("#word").inner_text() == f"Word: {text}"


def test_order_and_more_words(visit, two):
    page = visit()
    rows = page.locator("#words tbody tr")
    assert rows.count() == 12
    page.get_by_role("button", name="Show more").click()
    assert rows.count() == 24
    first = rows.first.locator("td").all_inner_texts()
    assert (first[3], first[6], first[9]) in {("yes", "no", "−1"), ("no", "yes", "+1")}
    text = page.locator("#words p").first.inner_text()
    counts = re.fullmatch(
        r"Fully absorbed by both SAEs: (\d+) words, only by mask on: (\d+), "
        r"only by mask off: (\d+)\.", text
    ).groups()  # fmt: skip
    both, one, other = map(int, counts)
    on, off = ([item.full for item in each.items] for each in two)
    assert (both + one, both + other) == (sum(on), sum(off))
    assert both == sum(a * b for a, b in zip(on, off, strict=True)) and one + other > 0
    page.locator("#order").select_option(label="worst in mask off first")
    first = rows.first.locator("td").all_inner_texts()
    assert first[6] == "yes"


def test_planted_children_in_the_page(visit):
    page = visit("planted")
    assert page.locator("#word").inner_text() == "Child 3"
    assert "direction of parent 0" in page.locator("#word-view").inner_text()
    assert "Absorbed on 100% of the samples." in page.locator("#word-view").inner_text()
    assert page.locator("#words tbody tr").count() == 1
    assert page.locator("[data-role=absorbing]").count() == 1
    features = page.locator("#latent-view .bars tbody th").all_inner_texts()
    assert {"parent 0", "child 3"} <= {*features}  # latent 3 points along both
    assert not page.get_by_text("Contexts with the largest values").count()


@pytest.mark.parametrize("name", ["two", "planted"])
def test_a_phone_in_the_dark(visit, name):
    page = visit(name, width=390, color_scheme="dark", is_mobile=True, has_touch=True)
    page.get_by_text("How to read this page").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    light = """e => getComputedStyle(e).backgroundColor.match(/\\d+/g).slice(0, 3)
        .map(Number).reduce((a, b) => a + b) / 3"""
    body = page.locator("body")
    assert body.evaluate(light) < 40
    page.locator("#theme").click()
    assert body.evaluate(light) > 230


def test_print_has_bars_and_no_controls(visit):
    page = visit()
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#query").is_visible() and not page.locator("#theme").is_visible()
    assert page.locator(".fill.absorbing").first.is_visible()
    adjust = "e => getComputedStyle(e).printColorAdjust"
    assert page.locator(".fill.absorbing").first.evaluate(adjust) == "exact"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
