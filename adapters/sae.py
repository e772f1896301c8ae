"""Sparse dictionaries beside the NLA: latents in words, residuals in two languages.

>>> sae = load_dictionary("path/to/sae")                # or a hub repository, or a sae_lens.SAE
>>> explain_features(nla, sae, [7560, 12])              # what the AV says of decoder rows
>>> decompose(nla, sae, residual)                       # the strongest latents beside its text
>>> run_with_nla(model, tokens, nla)                    # splice AR(AV(x)) in, as run_with_saes does
"""

from __future__ import annotations

from nla_lens.adapters.dictionaries.decomposition import Decomposition, decompose
from nla_lens.adapters.dictionaries.dictionary import Dictionary, DictionaryConfig
from nla_lens.adapters.dictionaries.feature_table import FeatureExplanation, FeatureExplanations
from nla_lens.adapters.dictionaries.features import explain_features, label_score
from nla_lens.adapters.dictionaries.labels import LabelScores
from nla_lens.adapters.dictionaries.loading import load_dictionary
from nla_lens.adapters.dictionaries.nla_dictionary import NLADictionary
from nla_lens.adapters.dictionaries.splicing import run_with_nla

__all__ = [
    "Decomposition",
    "Dictionary",
    "DictionaryConfig",
    "FeatureExplanation",
    "FeatureExplanations",
    "LabelScores",
    "NLADictionary",
    "decompose",
    "explain_features",
    "label_score",
    "load_dictionary",
    "run_with_nla",
]
