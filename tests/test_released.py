"SAEBench's probes as released: each step against numbers worked out by hand, and the protocol."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from atm_sae.core import generator
from atm_sae.evals import released as rl
from atm_sae.evals.absorption import AbsorptionConfig, Exact, evaluate_absorption, find_protocol
from atm_sae.evals.absorption import best_single_latent_f1, word_latents
from atm_sae.evals.first_letter import LETTERS, TaskSpec, task_from_activations
from atm_sae.evals.released import (
    LETTER_SCHEDULE,
    RANKING_SCHEDULE,
    Released,
    Schedule,
    epoch_order,
    first_weights,
    logit_slopes,
    positive_weights,
    rank_released,
    released_task,
    train_probes,
)
from atm_sae.evals.saebench import absorption_json

T = torch.tensor
QUICK = Released(
    replace(LETTER_SCHEDULE, lr=0.1, epochs=40), replace(RANKING_SCHEDULE, lr=0.1, epochs=300)
)
ONE_STEP = Schedule(batch_size=8, weight_decay=0, epochs=1)


class Alphabet:
    "Latents of letters and endings; words with the first `absorbed` endings have one of their own."

    def __init__(self, absorbed):
        plain = torch.eye(46)
        pairs = torch.cat(
            [
                torch.eye(26).repeat_interleave(absorbed, 0),
                plain[:20, :20][:absorbed].repeat(26, 1),
            ],
            1,
        )
        plain[:26, 26 : 26 + absorbed] = plain[26 : 26 + absorbed, :26] = -1
        self.W_enc, self.W_dec = torch.cat([plain, pairs]).T, torch.cat([torch.eye(46), pairs])
        self.b = torch.cat([torch.zeros(46), -torch.ones(len(pairs))])

    def encode(self, x):
        return (x @ self.W_enc + self.b).relu()

    def decode(self, z):
        return z @ self.W_dec


def alphabet_task(seed=0, letters=LETTERS):
    "Words that are one letter and one of twenty endings each."
    letter = torch.arange(len(letters)).repeat_interleave(20)
    x = torch.zeros(len(letter), 46)
    index = T([LETTERS.index(name) for name in letters])[letter]
    x[range(len(x)), index] = x[range(len(x)), 26 + torch.arange(20).repeat(len(letters))] = 1
    names = [LETTERS[i] for i in index]
    words = pd.DataFrame(dict(text=[f"{n}{i}" for i, n in enumerate(names)], letter=names))
    return task_from_activations(x, words, seed, model="alphabet")


@pytest.fixture(scope="module")
def task():
    return alphabet_task()


# the schedule


def test_learning_rate_decays_by_the_same_factor_each_epoch():
    rates = [RANKING_SCHEDULE.rate(epoch) for epoch in range(51)]
    assert rates[0] == 0.01 and rates[50] == pytest.approx(1e-5)
    assert rates[1] / rates[0] == pytest.approx(0.001 ** (1 / 50))
    assert rates[25] == pytest.approx(3.1623e-4, rel=1e-4)


def test_steps_of_the_released_settings():
    assert (LETTER_SCHEDULE.batch_size, LETTER_SCHEDULE.weight_decay) == (64, 1e-4)
    assert LETTER_SCHEDULE.l1_decay == 0
    ranking = RANKING_SCHEDULE
    assert (ranking.batch_size, ranking.weight_decay, ranking.l1_decay) == (4096, 1e-6, 0.01)
    assert [ranking.steps(n) for n in (1, 4096, 4097, 25_268)] == [50, 50, 100, 350]
    assert LETTER_SCHEDULE.steps(65) == 100


def test_as_many_steps_as_released_are_the_released_schedule():
    "7,202 words: two batches an epoch, of 4,096 and the rest, not of 3,601 each."
    assert RANKING_SCHEDULE.steps(7202) == 100
    assert RANKING_SCHEDULE.with_steps(100, 7202) is RANKING_SCHEDULE
    assert RANKING_SCHEDULE.with_steps(200, 7202).batch_size == 1801


@pytest.mark.parametrize(
    ("steps", "epochs", "batch_size"), [(25, 25, 1000), (100, 50, 500), (1600, 50, 32)]
)
def test_a_number_of_steps_is_reached_by_another_batch_size(steps, epochs, batch_size):
    other = RANKING_SCHEDULE.with_steps(steps, 1000)
    assert (other.epochs, other.batch_size, other.steps(1000)) == (epochs, batch_size, steps)
    assert other.l1_decay == RANKING_SCHEDULE.l1_decay


@pytest.mark.parametrize("name", ["batch_size", "epochs", "lr", "end_lr"])
def test_impossible_schedules(name):
    with pytest.raises(ValueError, match=f"Schedule: {name} = 0, but it must be above 0"):
        replace(RANKING_SCHEDULE, **{name: 0})


# one step


def test_words_with_the_letter_weigh_as_much_as_those_without():
    Y = T([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    assert positive_weights(Y).tolist() == pytest.approx([3, 3, 1 / 3])
    Y[:, 1] = False
    with pytest.raises(ValueError, match=r"probes \[1\] have no positive example"):
        positive_weights(Y)


def test_slopes_by_hand():
    "Two probes, two words: sigmoid(log 3) = 3/4, so 3/4 without the letter, -2 * 1/4 with it."
    logits = torch.log(T([[3.0, 3.0], [1 / 3, 3.0]]))
    slopes = logit_slopes(logits, T([[1.0, 0], [0, 1]]), T([2.0, 1]))
    assert torch.allclose(slopes, T([[-0.5, 0.75], [0.25, -0.25]]) / 4)


def test_the_first_step_of_adam_is_the_learning_rate():
    x, Y = T([[1.0, 0], [-1, 0]]), T([[True], [False]])
    W, b = train_probes(x, Y, ONE_STEP, torch.Generator().manual_seed(0))
    first, b_0 = first_weights(2, 1, torch.Generator().manual_seed(0))
    assert (W - first)[:, 0].tolist() == pytest.approx([0.01, 0], abs=1e-6)
    assert (first.abs() <= 2**-0.5).all() and abs(float(b - b_0)) == pytest.approx(0.01, abs=1e-4)


def test_both_penalties_pull_at_weights_without_data():
    "A weight whose input is always zero moves against its sign, by the learning rate."
    x, Y = T([[1.0, 0], [-1, 0]]), T([[True], [False]])
    first, _ = first_weights(2, 1, torch.Generator().manual_seed(0))
    for penalty in (dict(l1_decay=0.01), dict(weight_decay=0.01)):
        W, _ = train_probes(x, Y, replace(ONE_STEP, **penalty), torch.Generator().manual_seed(0))
        move = float(W[1] - first[1])
        assert move == pytest.approx(-0.01 * float(first[1].sign()), rel=1e-3)


def reference_probes(x, Y, schedule, seed):
    "The same training with PyTorch's own layer, loader, loss and automatic differentiation."
    torch.manual_seed(seed)
    data = torch.utils.data.TensorDataset(x, Y.float())
    loader = torch.utils.data.DataLoader(data, batch_size=schedule.batch_size, shuffle=True)
    layer = torch.nn.Linear(x.shape[1], Y.shape[1])
    loss_of = torch.nn.BCEWithLogitsLoss(pos_weight=(~Y).sum(0) / Y.sum(0))
    adam = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=schedule.weight_decay)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.001 ** (1 / schedule.epochs))
    for _ in range(schedule.epochs):
        for batch, y in loader:
            adam.zero_grad()
            l1 = layer.weight.abs().sum(-1).mean()
            (loss_of(layer(batch), y) + schedule.l1_decay * l1).backward()
            adam.step()
        decay.step()
    return layer.weight.detach().T, layer.bias.detach()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_training_is_that_of_pytorch_itself(share):
    "Dense inputs, and sparse ones that are multiplied as dense and as sparse batches."
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 12, generator=g) * (torch.rand(50, 12, generator=g) <= share)
    Y = torch.arange(50)[:, None] % 3 == torch.arange(3)
    schedule = Schedule(batch_size=16, weight_decay=1e-3, l1_decay=0.01, epochs=5)
    inputs = x if share == 1 else sparse.csr_matrix(x.numpy())
    W, b = train_probes(inputs, Y, schedule, torch.Generator().manual_seed(7))
    with torch.random.fork_rng():
        theirs, their_bias = reference_probes(x, Y, schedule, 7)
    assert torch.allclose(W, theirs, atol=1e-5) and torch.allclose(b, their_bias, atol=1e-5)


def test_each_epoch_has_an_order_of_its_own():
    g = torch.Generator().manual_seed(0)
    first, second = epoch_order(100, g), epoch_order(100, g)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, second)


# ranking


def test_latents_are_ranked_by_signed_weight():
    "Latent 1 is active on words without A alone: its weight is negative, so it comes last."
    letter = T([0, 0, 0, 0, 1, 1, 1, 1])
    z = np.array([[5, 5, 5, 5, 0, 0, 0, 0], [0, 0, 0, 0, 9, 9, 9, 9], [1, 0, 1, 0, 1, 0, 1, 0.0]]).T
    long = QUICK.ranking
    of_a, of_b = rank_released(sparse.csr_matrix(z), letter, [0, 1], 0, long, n=3)
    assert of_a.tolist() == [0, 2, 1] and of_b.tolist() == [1, 2, 0]
    assert [len(latents) for latents in rank_released(sparse.csr_matrix(z), letter, [1], n=2)] == [
        2
    ]


def test_ranking_depends_on_the_seed_and_on_nothing_else():
    g = torch.Generator().manual_seed(0)
    z = sparse.random(200, 60, 0.1, "csr", random_state=0)
    letter = torch.randint(0, 5, (200,), generator=g)
    one, again, other = (
        rank_released(z, letter, range(5), seed, replace(RANKING_SCHEDULE, epochs=3))
        for seed in (0, 0, 1)
    )
    assert all(map(np.array_equal, one, again)) and not all(map(np.array_equal, one, other))


# letters' probes


def test_probes_of_a_task_are_trained_once(task, monkeypatch):
    calls = []
    true = rl.train_probes
    monkeypatch.setattr(rl, "train_probes", lambda *given: calls.append(1) or true(*given))
    fresh = replace(task)
    assert fresh.memo == {}
    first = released_task(fresh, QUICK.letters)
    assert released_task(fresh, QUICK.letters) is first and calls == [1]
    for other in (QUICK.letters, replace(QUICK.letters, epochs=1)):
        released_task(fresh, other)
    assert calls == [1, 1]


def test_probes_are_seeded_by_the_task(task):
    probes = released_task(task, QUICK.letters)
    g = generator(0, "saebench", "letters")
    Y = task.letter[~task.test][:, None] == torch.arange(26)
    W, b = train_probes(task.x[~task.test], Y, QUICK.letters, g)
    assert torch.equal(probes.W, W.T) and torch.equal(probes.b, b)
    other = released_task(replace(task, spec=TaskSpec(seed=1)), QUICK.letters)
    assert not torch.equal(other.W, probes.W)


def test_a_letter_without_words_has_no_probe():
    task = released_task(alphabet_task(letters="ABCDE"), QUICK.letters)
    assert (task.W[5:] == 0).all() and (task.b[5:] == -1).all() and (task.f1[5:] == 0).all()
    assert (task.f1[:5] > 0.6).all()


def test_outliers_are_left_out_of_the_probes(task):
    spoilt = replace(task, x=task.x.clone())
    loud = (~task.test).nonzero()[0, 0]
    spoilt.x[loud] *= 1000
    assert torch.equal(
        released_task(spoilt, QUICK.letters).W,
        released_task(task.only(torch.arange(len(task.x)) != loud), QUICK.letters).W,
    )


# the protocol


def test_the_protocol_is_chosen_by_name(task):
    assert find_protocol("exact") == Exact() and find_protocol("saebench") == Released()
    assert find_protocol(QUICK) is QUICK
    message = "unknown protocol 'released': choose one of exact, saebench"
    with pytest.raises(ValueError, match=message):
        evaluate_absorption(Alphabet(0), task, protocol="released")


@pytest.mark.parametrize("absorbed", [0, 5])
def test_absorption_that_is_known_exactly(task, absorbed):
    result = evaluate_absorption(Alphabet(absorbed), task, protocol=QUICK)
    exact = evaluate_absorption(Alphabet(absorbed), task)
    assert result.full == exact.full and exact.full == pytest.approx(absorbed / 20, abs=0.08)
    assert result.config["protocol"] == "saebench" and exact.config["protocol"] == "exact"
    assert set(result.metrics) == {
        "saebench_full_absorption",
        "saebench_absorption_fraction",
        "saebench_letters",
    }
    assert exact.metrics == dict(
        mean_full_absorption_score=exact.full,
        mean_absorption_fraction_score=exact.fraction,
        n_letters=26,
    )


def test_words_are_encoded_once_for_both_protocols_and_the_best_latents(task, monkeypatch):
    spoilt = replace(task, x=task.x.clone())
    spoilt.x[0] *= 1000  # an outlier
    sae = Alphabet(5)
    apart = [evaluate_absorption(sae, spoilt, protocol=each) for each in ("exact", QUICK)]
    best, calls, encode = best_single_latent_f1(sae, spoilt), [], sae.encode
    sae.encode = lambda x: calls.append(len(x)) or encode(x)
    latents = word_latents(sae, spoilt)
    together = [evaluate_absorption(sae, latents, protocol=each) for each in ("exact", QUICK)]
    assert best_single_latent_f1(sae, latents).equals(best)
    assert sum(calls) == len(latents.z.indptr) - 1
    for one, other in zip(apart, together):
        assert one.letters.equals(other.letters) and one.words.equals(other.words)
        assert one.config == other.config
    with pytest.raises(ValueError, match="latents are of another SAE: call word_latents"):
        evaluate_absorption(Alphabet(5), latents)


def test_same_seed_same_score_other_seed_other_score(task):
    "Random latents, for which the ranking decides."
    g = torch.Generator().manual_seed(0)
    sae = Alphabet(0)
    sae.W_enc = torch.randn(46, 200, generator=g)
    sae.W_dec, sae.b = sae.W_enc.T.contiguous(), -2.0
    few = replace(QUICK, ranking=RANKING_SCHEDULE)
    one, again, other = (
        evaluate_absorption(sae, replace(task, spec=TaskSpec(seed=seed)), protocol=few)
        for seed in (0, 0, 1)
    )
    assert one.letters.equals(again.letters) and one.fraction != other.fraction


def test_letters_over_the_bar_are_scored_however_few(task):
    "Half of the letters have activations that say nothing."
    x = task.x.clone()
    x[task.letter >= 8, :26] = 0
    poor = task_from_activations(x, task.words.drop(columns="test"), model="alphabet")
    with pytest.raises(ValueError, match="only 8 letters have a probe .*20 are needed"):
        evaluate_absorption(Alphabet(0), poor)
    result = evaluate_absorption(Alphabet(0), poor, protocol=QUICK)
    assert result.letters.first_letter.tolist() == list("ABCDEFGH") and result.n_letters == 8
    with pytest.raises(ValueError, match="only 0 letters .*> 2 .*1 are needed"):
        evaluate_absorption(Alphabet(0), poor, AbsorptionConfig(min_f1=2), protocol=QUICK)


def test_files_of_saebench_say_the_protocol(task):
    result = evaluate_absorption(Alphabet(5), task, protocol=QUICK)
    out = absorption_json(result)
    assert out["eval_config"]["k_sparse_probe_l1_decay"] == 0.01
    assert out["eval_config"]["k_sparse_probe_batch_size"] == 4096
    assert out["eval_config"]["k_sparse_probe_num_epochs"] == 300
    assert out["eval_config"]["min_feats_for_eval"] == 1
    more = out["eval_result_unstructured"]
    assert more["protocol"] == "saebench" and more["n_letters"] == 26
    assert more["probes"]["letters"]["lr"] == 0.1 and more["l2"] is None
    exact = absorption_json(evaluate_absorption(Alphabet(5), task))
    assert exact["eval_result_unstructured"]["protocol"] == "exact"
    assert "k_sparse_probe_l1_decay" not in exact["eval_config"]
