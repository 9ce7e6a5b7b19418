"""Sparse autoencoders with Adaptive Temporal Masking, and an exact test of feature absorption."""

__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

# The public names, module by module. A module is imported when one of its names is first used, so that `import atm_sae`
# and `atm-sae --help` need no PyTorch. To add a name: one entry here, and the same in the imports below (a test compares).
_NAMES = {
    'absorption': ['FirstLetterTask', 'best_single_latent_f1', 'evaluate_absorption', 'get_task'],
    'activations': ['ActivationSpec', 'get_activations', 'held_out'],
    'atm': ['ATMConfig', 'ATMMasker', 'BlindMasker'],
    'lm': ['load_lm', 'residual_stream', 'splice'],
    'metrics': ['dictionary_agreement', 'planted_metrics', 'reconstruction_metrics', 'spliced_metrics'],
    'pretrained': ['export_sae', 'from_pretrained', 'model_card', 'push_to_hub'],
    'probing': ['evaluate_probing', 'probing_tasks'],
    'probing_sets': ['dataset_tasks'],
    'sae': ['SAE', 'SAEConfig'],
    'saebench': ['absorption_json', 'core_json', 'probing_json', 'read_saebench'],
    'synthetic': ['PlantedWorld', 'WorldBatches', 'WorldConfig'],
    'train': ['METHODS', 'RunSpec', 'TrainConfig', 'get_run', 'grid', 'recipe', 'run_grid', 'train'],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)

if TYPE_CHECKING:  # what type checkers and editors read; `X as X` says that X is public
    from atm_sae.absorption import (FirstLetterTask as FirstLetterTask, best_single_latent_f1 as best_single_latent_f1,
                                    evaluate_absorption as evaluate_absorption, get_task as get_task)
    from atm_sae.activations import ActivationSpec as ActivationSpec, get_activations as get_activations, held_out as held_out
    from atm_sae.atm import ATMConfig as ATMConfig, ATMMasker as ATMMasker, BlindMasker as BlindMasker
    from atm_sae.lm import load_lm as load_lm, residual_stream as residual_stream, splice as splice
    from atm_sae.metrics import (dictionary_agreement as dictionary_agreement, planted_metrics as planted_metrics,
                                 reconstruction_metrics as reconstruction_metrics, spliced_metrics as spliced_metrics)
    from atm_sae.pretrained import (export_sae as export_sae, from_pretrained as from_pretrained, model_card as model_card,
                                    push_to_hub as push_to_hub)
    from atm_sae.probing import evaluate_probing as evaluate_probing, probing_tasks as probing_tasks
    from atm_sae.probing_sets import dataset_tasks as dataset_tasks
    from atm_sae.sae import SAE as SAE, SAEConfig as SAEConfig
    from atm_sae.saebench import (absorption_json as absorption_json, core_json as core_json, probing_json as probing_json,
                                  read_saebench as read_saebench)
    from atm_sae.synthetic import PlantedWorld as PlantedWorld, WorldBatches as WorldBatches, WorldConfig as WorldConfig
    from atm_sae.train import (METHODS as METHODS, RunSpec as RunSpec, TrainConfig as TrainConfig, get_run as get_run, grid as grid,
                               recipe as recipe, run_grid as run_grid, train as train)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = value = getattr(import_module(f'{__name__}.{_HOME[name]}'), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})


class _Package(ModuleType):
    "A package whose public names are not hidden by modules of the same name: `train` is the function."
    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, ModuleType)): super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
