"""Modules: blocks, heads, embeddings, the recursion and the official tiny recursive model."""

from trm_fast.nn._config import CONFIGS, TRMConfig
from trm_fast.nn.attention import Attention
from trm_fast.nn.block import Block, Blocks
from trm_fast.nn.carry import Carry, Outputs
from trm_fast.nn.embeddings import LearnedPositions, SparsePuzzleEmbedding, TokenEmbedding
from trm_fast.nn.halting import PooledHalt, QTokenHalt
from trm_fast.nn.mixer import FusedMixer, Mixer, named_mixer
from trm_fast.nn.norm import RMSNorm
from trm_fast.nn.prediction import Prediction
from trm_fast.nn.recursion import Recursion
from trm_fast.nn.supervision import deep_supervision, joint_supervision
from trm_fast.nn.swiglu import SwiGLU, inner_width
from trm_fast.nn.tiny_recursive_model import TinyRecursiveModel
from trm_fast.nn.token_mixer import TokenMixer
from trm_fast.nn.vector_net import VectorNet

__all__ = [
    "CONFIGS",
    "Attention",
    "Block",
    "Blocks",
    "Carry",
    "FusedMixer",
    "LearnedPositions",
    "Mixer",
    "Outputs",
    "PooledHalt",
    "Prediction",
    "QTokenHalt",
    "RMSNorm",
    "Recursion",
    "SparsePuzzleEmbedding",
    "SwiGLU",
    "TRMConfig",
    "TinyRecursiveModel",
    "TokenEmbedding",
    "TokenMixer",
    "VectorNet",
    "deep_supervision",
    "inner_width",
    "joint_supervision",
    "named_mixer",
]
