"""Sparse autoencoders with Adaptive Temporal Masking, and an exact test of feature absorption."""

__version__ = "0.1.0"

from atm_sae.absorption import FirstLetterTask, best_single_latent_f1, evaluate_absorption, get_task
from atm_sae.activations import ActivationSpec, get_activations, held_out
from atm_sae.atm import ATMConfig, ATMMasker, BlindMasker
from atm_sae.lm import load_lm, residual_stream, splice
from atm_sae.metrics import dictionary_agreement, planted_metrics, reconstruction_metrics, spliced_metrics
from atm_sae.probing import evaluate_probing, probing_tasks
from atm_sae.probing_sets import dataset_tasks
from atm_sae.sae import SAE, SAEConfig
from atm_sae.saebench import absorption_json, core_json, probing_json, read_saebench
from atm_sae.synthetic import PlantedWorld, WorldBatches, WorldConfig
from atm_sae.train import METHODS, RunSpec, TrainConfig, get_run, grid, recipe, run_grid, train
