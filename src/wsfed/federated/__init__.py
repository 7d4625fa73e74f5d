"""Training over many workers: rounds, strategies, samples of sites, partitions.

::

    history = await federated.fit(
        model,
        [partial(wsfed.connect, "ws://127.0.0.1:8777"), partial(wsfed.connect, "ws://127.0.0.1:8778")],
        "digits",
        F.cross_entropy,
        partial(torch.optim.SGD, lr=0.1),
        rounds=10,
    )
"""

from __future__ import annotations

from wsfed.federated import partition
from wsfed.federated.averaging import Mean, weighted_mean
from wsfed.federated.callbacks import Callback, EarlyStopping
from wsfed.federated.checkpoint import Checkpoint
from wsfed.federated.compression import Cast, Compression, Quantise, TopK
from wsfed.federated.contribution import SecAgg, arch_hash
from wsfed.federated.dp import DP
from wsfed.federated.dpsgd import DPSGD
from wsfed.federated.fit import fit
from wsfed.federated.history import History, Round, SiteRound
from wsfed.federated.recipe import seed_of
from wsfed.federated.sampling import (
    Candidate,
    Everyone,
    Poisson,
    Sampler,
    Selection,
    Stratified,
    Uniform,
    Weighted,
    Where,
    tagged,
)
from wsfed.federated.strategies.bulyan import Bulyan
from wsfed.federated.strategies.fedasync import FedAsync
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedavgm import FedAvgM
from wsfed.federated.strategies.fedbuff import FedBuff
from wsfed.federated.strategies.fedmedian import FedMedian
from wsfed.federated.strategies.fedopt import FedAdagrad, FedAdam, FedOpt, FedYogi
from wsfed.federated.strategies.fedprox import FedProx
from wsfed.federated.strategies.fedsgd import FedSGD
from wsfed.federated.strategies.fedtrimmedavg import FedTrimmedAvg
from wsfed.federated.strategies.geometric import GeometricMedian
from wsfed.federated.strategies.krum import Krum, MultiKrum
from wsfed.federated.strategies.qfedavg import QFedAvg
from wsfed.federated.strategies.scaffold import Scaffold
from wsfed.federated.strategies.strategy import LocalTerms, MeanStrategy, Reply, Strategy

__all__ = [
    "DP",
    "DPSGD",
    "Bulyan",
    "Callback",
    "Candidate",
    "Cast",
    "Checkpoint",
    "Compression",
    "EarlyStopping",
    "Everyone",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedMedian",
    "FedOpt",
    "FedProx",
    "FedSGD",
    "FedTrimmedAvg",
    "FedYogi",
    "GeometricMedian",
    "History",
    "Krum",
    "LocalTerms",
    "Mean",
    "MeanStrategy",
    "MultiKrum",
    "Poisson",
    "QFedAvg",
    "Quantise",
    "Reply",
    "Round",
    "Sampler",
    "Scaffold",
    "SecAgg",
    "Selection",
    "SiteRound",
    "Strategy",
    "Stratified",
    "TopK",
    "Uniform",
    "Weighted",
    "Where",
    "arch_hash",
    "fit",
    "partition",
    "seed_of",
    "tagged",
    "weighted_mean",
]
