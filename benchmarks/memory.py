"""Peak memory and seconds of scoring a wide SAE on many words, each protocol in its own process.

python benchmarks/memory.py            # 65,536 latents, 100,000 words: some minutes, one thread
python benchmarks/memory.py --quick    # tiny sizes: does it run?
"""

import argparse
import time
import warnings

import pandas as pd
import torch
from absorption import MEMORY_MIB, new_process, word_sae

from atm_sae.artefacts import provenance
from atm_sae.core import generator
from atm_sae.evals.absorption import PROTOCOLS, AbsorptionConfig, evaluate_absorption
from atm_sae.evals.first_letter import LETTERS, FirstLetterTask

FULL = dict(words=100_000, d_in=576, d_sae=65_536, l0=40)
QUICK = dict(words=600, d_in=64, d_sae=256, l0=8)


def handmade_task(n_words, d_in, seed=0):
    """Random words: the direction of the letter, of length 1, plus noise of deviation 0.2.

    The probes are the directions themselves, with a bias of -0.5; nothing is fitted."""
    draws = generator(seed, "memory benchmark")
    directions = torch.linalg.qr(torch.randn(d_in, 26, generator=draws)).Q.T.contiguous()
    letter = torch.randint(26, (n_words,), generator=draws)
    words = pd.DataFrame(
        {
            "token_id": range(n_words),
            "text": [f"{LETTERS[k].lower()}{i}" for i, k in enumerate(letter)],
            "letter": [LETTERS[k] for k in letter],
            "test": (torch.rand(n_words, generator=draws) < 0.2).numpy(),
        }
    )
    x = directions[letter] + 0.2 * torch.randn(n_words, d_in, generator=draws)
    f1 = torch.ones(26)
    return FirstLetterTask(words, x, directions, torch.full((26,), -0.5), f1, model="random words")


def measure(protocol, sizes):
    "Peak MiB of this process before and after the scores, their seconds, and number of letters."
    torch.set_num_threads(1)
    task = handmade_task(sizes["words"], sizes["d_in"])
    sae = word_sae(task, sizes["d_sae"], l0=sizes["l0"])
    before, begin = provenance()["peak_memory_mib"], time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no model reads these words
        config = AbsorptionConfig(min_f1=-1, min_letters=1)
        result = evaluate_absorption(sae, task, config, protocol=protocol)
    seconds = time.process_time() - begin
    return before, provenance()["peak_memory_mib"], seconds, len(result.letters)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    sizes = QUICK if parser.parse_args().quick else FULL
    print(", ".join(f"{name} {value:,}" for name, value in sizes.items()) + "\n")
    print("| protocol | words | letters | CPU s | peak MiB before | peak MiB | limit |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for protocol in PROTOCOLS:
        with new_process() as process:
            before, peak, seconds, letters = process.submit(measure, protocol, sizes).result()
        verdict = "met" if peak < MEMORY_MIB else "NOT met"
        row = (
            protocol,
            f"{sizes['words']:,}",
            letters,
            f"{seconds:.1f}",
            f"{before:,}",
            f"{peak:,}",
        )
        print(f"| {' | '.join(map(str, row))} | {MEMORY_MIB:,}: {verdict} |", flush=True)


if __name__ == "__main__":
    main()
