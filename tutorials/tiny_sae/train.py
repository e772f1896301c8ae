"""Trains a small sparse autoencoder on the embedded NLA's source model, with sae-lens.

``python tutorials/tiny_sae/train.py --out tutorials/tiny_sae/dictionary``

BatchTopK (arXiv 2412.06410) on the residuals that the NLA reads, of documents of the small world
(`tutorials/tiny_nla/corpus.py`) that neither was trained on. It needs `sae-lens`; reading what it
wrote does not. A minute on one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from safetensors.torch import load_file, save_file

import nla_lens

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_nla"))
import corpus

SEED = 9_100_001
LATENTS, K = 512, 8
DOCUMENTS, SAMPLES, BATCH = 12_000, 1_000_000, 1024
FIRST_POSITION = 1

log = logging.getLogger("tiny_sae")


def residuals(nla: nla_lens.NLA, seed: int, n_documents: int) -> torch.Tensor:
    """Residuals ``[n, d]`` where the NLA reads, the beginning-of-text token left out."""
    texts = [document.text for document in corpus.documents(seed, n_documents)]
    found = nla_lens.extract(nla.spec.source_model, texts, nla.spec.layer, batch_size=64)
    return torch.cat([resid.as_ordinary()[FIRST_POSITION:] for resid in found])


def batches(resid_ND: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled batches ``[BATCH, d]``, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(resid_ND), generator=generator).split(BATCH):
            if len(rows) == BATCH:
                yield resid_ND[rows]


def train(resid_ND: torch.Tensor, hook_name: str, seed: int) -> BatchTopKTrainingSAE:
    """Trains a dictionary.

    Args:
        resid_ND: Residuals, ``[n, d]``.
        hook_name: Where they were read; goes into the dictionary's metadata.
        seed: Of weights and batches.
    """
    torch.manual_seed(seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=resid_ND.shape[1], d_sae=LATENTS, k=K)
    )
    sae.cfg.metadata.hook_name = hook_name
    sae.cfg.metadata.model_name = "nla_lens/tiny/source"
    # The mean goes into the bias, so that latents need not say what all residuals have in common.
    sae.b_dec.data = resid_ND.mean(0)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=SAMPLES,
            device="cpu",
            autocast=False,
            lr=2e-3,
            lr_end=2e-4,
            lr_scheduler_name="constant",
            lr_warm_up_steps=50,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=SAMPLES // BATCH // 3,
            n_restart_cycles=1,
            train_batch_size_samples=BATCH,
            dead_feature_window=200,
            feature_sampling_window=200,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches(resid_ND, seed),
    )
    trainer.fit()
    return sae


def compact(folder: Path) -> None:
    """Rounds the weights to bf16, and leaves out of the config what names this machine."""
    weights = folder / "sae_weights.safetensors"
    save_file({k: v.bfloat16().contiguous() for k, v in load_file(weights).items()}, weights)
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text(encoding="utf-8"))
    cfg["dtype"] = "bfloat16"
    path.write_text(json.dumps(cfg, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Trains, measures on fresh documents, and writes the dictionary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "dictionary")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    nla = nla_lens.NLA.from_pretrained("tiny")
    resid_ND = residuals(nla, SEED, DOCUMENTS)
    log.info("%d residuals", len(resid_ND))
    sae = train(resid_ND, str(nla.spec.hook_name), SEED)
    sae.save_inference_model(args.out)
    compact(args.out)

    from nla_lens.adapters.sae import load_dictionary

    held_ND = residuals(nla, SEED + 1, 500)
    found = load_dictionary(args.out)
    acts_NF = found.encode(held_ND)
    error = (found.decode(acts_NF) - held_ND).square().sum()
    total = (held_ND - resid_ND.mean(0)).square().sum()
    log.info(
        "fresh documents: variance explained %.3f, L0 %.1f, latents never active %d of %d",
        1 - error / total,
        acts_NF.ne(0).float().sum(-1).mean(),
        int((~acts_NF.ne(0).any(0)).sum()),
        LATENTS,
    )


if __name__ == "__main__":
    main()
