"""The schema of a run: every key, its type, its default and what it means.

One class per section of the YAML file. Rules inside one key are here; rules between keys live with
the dimension of parallelism that they concern (`moesys.parallel`). Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from moesys.config.moe import GateConfig as GateConfig
from moesys.config.moe import MoEConfig as MoEConfig
from moesys.config.registry import DISPATCHERS, MIXERS, section
from moesys.config.rope import RopeScalingConfig
from moesys.config.section import (
    LONGEST_RUN_NAME,
    AtMost,
    Batch,
    Dim,
    Fraction,
    Kinds,
    Layers,
    LongestText,
    NonNegative,
    NonNegativeFloat,
    Pieces,
    Positive,
    PositiveFloat,
    Ranks,
    Section,
    Seed,
    SlurmOption,
    Variable,
)

if TYPE_CHECKING:
    AttentionConfig: TypeAlias = Any
else:
    AttentionConfig = section(MIXERS, "gqa", "AttentionConfig")


MixerName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
"""Word for a mixer in a pattern."""
BlockWords = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]* (dense|moe)$")]
"""The mixer and the feed-forward of a block."""


class PatternConfig(Section):
    """Which mixer and which feed-forward each block has: "attention moe", "local dense"."""

    count: Layers
    """Decoder blocks in all."""
    first: Annotated[tuple[BlockWords, ...], Field(strict=False)] = ()
    """The first blocks, once: each a mixer (attention, or a name in model.mixers) and a feed-forward (dense or moe)."""
    repeat: Annotated[tuple[BlockWords, ...], Field(strict=False, min_length=1)]
    """The blocks after these, again and again; the last repetition may be cut short."""

    def block(self, layer: int) -> tuple[str, str]:
        """The words for block `layer`, from 0."""
        after = layer - len(self.first)
        words = self.first[layer] if after < 0 else self.repeat[after % len(self.repeat)]
        mixer, _, ffn = words.partition(" ")
        return mixer, ffn


class PredictionConfig(Section):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437): more blocks after the last one learn the tokens after the
    next one."""

    depth: Layers = 1
    """D: blocks, each like the last one of `layers`, that predict one token further each; embedding and head are the
    model's. They have the numbers that follow: layers.61 after 61 blocks."""
    loss_weight: PositiveFloat = 0.3
    """λ: λ / D times the sum of their losses is added to the loss (DeepSeek-V3: 0.3, then 0.1)."""


class ModelConfig(Section):
    vocab_size: Dim | None = None
    """Entries of the embedding; default: the tokenizer's, rounded up to a multiple of 64."""
    hidden: Dim
    """Size of the residual stream."""
    layers: Layers | PatternConfig
    """Decoder blocks: their number, or a pattern that says which mixer and which feed-forward each has."""
    ffn_hidden: Dim | None = None
    """Inner size of the feed-forward of dense layers."""
    attention: AttentionConfig = AttentionConfig()
    """The mixer of every block; in a pattern, that of the word attention."""
    mixers: dict[MixerName, AttentionConfig] = {}
    """More mixers, by the words that a pattern in `layers` has for them."""
    moe: MoEConfig | None = None
    """The MoE layers; null: every layer is dense."""
    mtp: PredictionConfig | None = None
    """Multi-token prediction in training; null: none. Evaluation leaves it out."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the output head."""
    head_bias: bool = False
    """A bias on the logits (Phi-3.5-MoE)."""
    norm: Literal["rms", "rms_zero_centered", "layer"] = "rms"
    """Norms of the stream. rms: RMSNorm. rms_zero_centered: the same with factors 1 + weight, those of queries and keys
    too (Qwen3-Next). layer: LayerNorm with biases (Phi-3.5-MoE)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square, or to the variance, in every norm."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the wavelengths of rotary positions."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretching of rotary positions to longer sequences; null: none."""
    embedding_multiplier: PositiveFloat = 1.0
    """Factor on the embedding (Granite)."""
    residual_multiplier: PositiveFloat = 1.0
    """Factor on the output of each mixer and feed-forward, before it is added to the stream (Granite)."""
    logits_divisor: PositiveFloat = 1.0
    """Divisor of the logits (Granite: logits_scaling)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation of all matrices."""

    @property
    def depth(self) -> int:
        """Blocks, without those of multi-token prediction."""
        return self.layers if isinstance(self.layers, int) else self.layers.count

    @property
    def predicted(self) -> int:
        """D: blocks of multi-token prediction, which follow the others in number."""
        return 0 if self.mtp is None else self.mtp.depth

    @property
    def blocks(self) -> int:
        """All blocks."""
        return self.depth + self.predicted

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """λ / D: the factor on the loss of each depth of multi-token prediction."""
        return () if self.mtp is None else (self.mtp.loss_weight / self.mtp.depth,) * self.mtp.depth

    @property
    def ends_share_embedding(self) -> bool:
        """True if the end of the model uses the embedding, too: as its head, or in multi-token prediction."""
        return self.tie_embeddings or self.mtp is not None

    def is_moe(self, layer: int) -> bool:
        """True if block `layer` (from 0) is an MoE block; those of multi-token prediction are like the last one."""
        layer = min(layer, self.depth - 1)
        if isinstance(self.layers, PatternConfig):
            return self.layers.block(layer)[1] == "moe"
        m = self.moe
        return m is not None and layer >= m.first_dense and (layer - m.first_dense + 1) % m.every == 0

    @property
    def moe_blocks(self) -> list[int]:
        """The numbers of the MoE blocks."""
        return [layer for layer in range(self.blocks) if self.is_moe(layer)]

    def mixer(self, layer: int) -> tuple[AttentionConfig, str]:
        """The section of the mixer of block `layer`, and its dotted key."""
        name = "attention" if isinstance(self.layers, int) else self.layers.block(min(layer, self.depth - 1))[0]
        if name == "attention":
            return self.attention, "model.attention"
        return self.mixers[name], f"model.mixers.{name}"


class DispatchKeys(Kinds):
    """Keys of all dispatchers."""

    chunks: Pieces = 1
    """Chunks of a micro-batch's tokens: one is sent while another is computed."""
    overlap_shared: bool = True
    """Compute shared experts during dispatch."""
    payload: Literal["model", "fp8"] = "model"
    """Encoding of rows that are sent to experts: the model's precision, or float8_e4m3 with a scale per 128 elements,
    which rounds them to 4 significant bits. Results and gradients are sent in the model's precision."""


if TYPE_CHECKING:
    DispatchConfig: TypeAlias = Any
else:
    DispatchConfig = section(DISPATCHERS, "all_to_all", "DispatchConfig", DispatchKeys)


class ParallelConfig(Section):
    dp: Ranks | Literal["auto"] = "auto"
    """Data parallelism: ranks that see different sequences. auto: world size / (tp · pp · cp)."""
    dp_shard: Ranks | Literal["full"] = 1
    """Shard parameters over this many of the dp ranks (FSDP2). 1: replicate; full: over all of them;
    between: hybrid, shards replicated dp / dp_shard times."""
    sync_gradients: Literal["auto", "once", "each"] = "auto"
    """When dp_shard sums gradients over the shards. once: once per step, and each rank holds them whole until then.
    each: for each micro-batch. auto: once, unless that needs more than cluster.memory_gib."""
    tp: Ranks = 1
    """Tensor parallelism: attention, feed-forward, embedding and head split inside layers."""
    sp: bool = True
    """Sequence parallelism: with tp, keep the stream between layers split along the sequence."""
    pp: Ranks = 1
    """Pipeline parallelism: stages of consecutive layers."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble"] = "1f1b"
    """Order of the forward and backward passes of micro-batches, as in `torch.distributed.pipelining`."""
    pp_virtual: Layers = 1
    """Stages per rank (interleaved-1f1b and zero-bubble)."""
    pp_split: list[Layers] | Literal["auto"] = "auto"
    """Layers of each stage, first to last; auto: balance the estimated cost of the stages."""
    cp: Ranks = 1
    """Context parallelism: every sequence split over ranks."""
    ep: Ranks = 1
    """Expert parallelism: the experts of a layer split over ranks, folded over dp, cp and tp."""
    etp: Ranks = 1
    """Tensor parallelism of each expert, independent of tp."""
    dispatch: DispatchConfig = DispatchConfig()


class OptimizerConfig(Section):
    kind: Literal["adamw", "apex"] = "adamw"
    """Either continues the other's checkpoints. adamw: torch's, fused if the device has it. apex: NVIDIA apex's
    FusedAdam (GPU)."""
    lr: PositiveFloat = 3e-4
    """Learning rate after the warm-up."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of Adam's second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices, also of those of gates, mixes, LoRA factors and embeddings. Norms, biases and a cosine
    gate's temperature do not decay."""
    clip: PositiveFloat | None = 1.0
    """Clip gradients to this global norm; null: never."""


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. cosine: falls by a cosine. wsd: stays, then falls linearly. constant: stays."""
    warmup: NonNegative = 0
    """Steps of linear warm-up."""
    decay: Positive | None = None
    """wsd: steps of the final decay; default: a fifth of all steps."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of lr."""


class SkipsConfig(Section):
    """A step whose loss or gradient is not finite is skipped: it updates nothing. These keys say how many a run
    survives."""

    consecutive: NonNegative = 5
    """Skipped steps in a row; one more ends the run."""
    total: NonNegative = 100
    """Skipped steps in the whole run, resumptions included; one more ends it."""


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), LongestText(64)]
"""Name of a held-out text."""


class HeldOutConfig(Section):
    """A text that is held out as a whole, beside the share of `data`; it has the run's tokenizer."""

    kind: Literal["python-stdlib", "text", "huggingface", "megatron"] = "text"
    """As data.kind."""
    path: str | None = None
    """As data.path."""
    text_key: str = "text"
    """As data.text_key."""
    split: str = "test"
    """As data.split."""


class TrainConfig(Section):
    steps: Positive = 100
    """Optimizer steps of the run."""
    init: str | None = None
    """Weights that a new run starts from, with a new optimizer: a released model's folder with config.json, a run's
    folder, or a checkpoint; null: random ones. A run that goes on from its own checkpoint does not read it."""
    seq_len: Annotated[int, Field(ge=1), AtMost(2**27)] = 256
    """Tokens per sequence."""
    global_batch: Batch = 8
    """Sequences per optimizer step, over all ranks."""
    micro_batch: Batch = 1
    """Sequences that one data-parallel rank passes through the model at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of computation. The optimizer's weights are float32 in either case."""
    freeze: list[str] = []
    """Parameters that are not trained, by patterns of their names: ["embed.weight", "layers.*.attention.*"]. The
    frozen weights of LoRA experts need not be named."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    skips: SkipsConfig = SkipsConfig()
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that backward recomputes. none: no activations. selective: all but those of matrix products and
    communication. full: whole blocks."""
    compile: bool = False
    """Compile each block with torch.compile."""
    deterministic: bool = False
    """Use torch's deterministic algorithms only."""
    eval_every: NonNegative = 0
    """Steps between evaluations on held-out data; 0: at the end only."""
    eval_sequences: Batch = 64
    """Held-out sequences per evaluation. Padding fills up the last global batch: no expert computes it, and it takes no
    place from tokens under a capacity."""
    eval: dict[SetName, HeldOutConfig] = {}
    """More held-out texts by name, beside the share of the data that `data.heldout` names; each is evaluated when that
    is, on as many sequences, and reported as eval/NAME/loss."""
    resume_changed: list[str] = []
    """Keys that may differ from the checkpoint's although they change numbers, such as [seed, data.heldout]."""


class DataConfig(Section):
    kind: Literal["python-stdlib", "text", "huggingface", "megatron"] = "python-stdlib"
    """python-stdlib: sources of Python's standard library; text: a file or folder of .txt, .md, .py
    or .jsonl files; huggingface: a dataset of Hugging Face `datasets`; megatron: .bin/.idx files."""
    path: str | None = None
    """File, folder, dataset name or .bin/.idx prefix; relative to the working directory."""
    text_key: str = "text"
    """The field that holds the text, in .jsonl files and Hugging Face datasets."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    tokenizer: str = "bytes"
    """bytes: one token per byte plus one between documents; else a Hugging Face tokenizer.json file."""
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents (by a hash of their name or number) held out from training."""
    cache: str | None = None
    """Folder for tokenized text; default: `$XDG_CACHE_HOME/moesys` or `~/.cache/moesys`."""


class ClusterConfig(Section):
    nodes: Ranks = 1
    """Machines of the run."""
    ranks_per_node: Annotated[int, Field(ge=1), AtMost(1024)] = 1
    """Worker processes per node: one per GPU; on CPU, any number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every worker. auto: GPUs if every worker gets one of its own, else CPU."""
    memory_gib: PositiveFloat | None = None
    """Memory of one device (or of one node, on CPU), for the dry run's verdict."""


class LaunchConfig(Section):
    launcher: Literal["ray", "local", "hosts", "slurm"] = "ray"
    """ray: workers of Ray Train. local: plain processes on this machine. hosts: the cluster's nodes emulated on this
    machine, as network namespaces (Linux, root). slurm: a batch job."""
    link_gbit: PositiveFloat | None = None
    """hosts: 10⁹ bits per second that each emulated host sends, and receives, at most; default: no limit."""
    ray_address: str | None = None
    """Address of a running Ray cluster; default: start Ray on this machine."""
    timeout_s: Annotated[float, Field(gt=0), AtMost(10**8)] = 300.0
    """Timeout of every process group, and of the wait for all workers to start."""
    max_failures: Annotated[int, Field(ge=0), AtMost(10**6)] = 0
    """Restarts of the workers from the latest checkpoint before the run fails (ray)."""
    threads: Annotated[int, Field(ge=1), AtMost(4096)] | None = None
    """CPU threads per worker; default: the node's cores divided by ranks_per_node, at least 1."""
    env: dict[Variable, str] = {}
    """Environment of the workers, beside NCCL_*, GLOO_*, TORCH_*, CUDA_* and MOESYS_* of the caller. A value $NAME is
    that of the caller's variable NAME; secrets, recognised by their names, are written nowhere."""
    slurm: dict[SlurmOption, str | int | bool | None] = {}
    """slurm: sbatch options without the dashes, for example {partition: gpu, time: 04:00:00, mem: 0}. true or null
    gives the option alone (exclusive: true). false leaves it out, even if moesys would give it."""


class OutputConfig(Section):
    runs: str = "runs"
    """Folder of all runs; a run's own folder is runs/NAME."""
    checkpoint_every: NonNegative = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 2
    """Number of checkpoints to keep, the newest."""
    export: Literal["none", "hf"] = "none"
    """hf: at the end of the run, write the model to runs/NAME/export/step-N as a folder that transformers, vLLM and
    SGLang open (moesys export)."""
    export_checkpoints: bool = False
    """With export: hf, write every checkpoint so, beside training, and keep as many of these folders as checkpoints."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard as well."""
    wandb: bool = False
    """Log to Weights & Biases, if it is installed."""
    log_every: Positive = 1
    """Steps between records in metrics.jsonl."""
    record_routing: NonNegative = 0
    """Steps, from the first, whose routing is written to runs/NAME/routing, for gate replay; 0: none."""


class MeasureConfig(Section):
    """Recording of communication inside steps, on every rank."""

    every: NonNegative = 0
    """Record every n-th step; 0: none but those of `steps`. `launch --measure` chooses about twenty."""
    steps: list[Positive] = []
    """Steps to record, beside every n-th."""
    audit: bool = False
    """In recorded steps all ranks meet before each dispatch and combine, so that waiting and transfer are
    separated exactly. This ends all overlap of communication with computation."""
    profile: str | None = None
    """Link model of the cluster, from `moesys bench a2a --profile`, for predictions."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port on which rank 0 serves the run's metrics to Prometheus."""
    metrics_host: str = "127.0.0.1"
    """Address of that port; the default can be reached from its own machine only."""


class Config(Section):
    """A run."""

    title = "a configuration"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), LongestText(LONGEST_RUN_NAME)] = "run"
    """Name of the run and of its folder; default: the configuration file's name."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of samples."""
    engine: Literal["native", "megatron"] = "native"
    """native: this project's model and parallelism; megatron: Megatron-Core's GPTModel, schedules, gradient reduction
    and optimizer, with this project's MoE layer."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    cluster: ClusterConfig = ClusterConfig()
    launch: LaunchConfig = LaunchConfig()
    output: OutputConfig = OutputConfig()
    measure: MeasureConfig = MeasureConfig()

    def measured(self) -> Config:
        """The same with about twenty recorded steps, unless `measure` says which."""
        if self.measure.every or self.measure.steps:
            return self
        measure = self.measure.model_copy(update={"every": max(1, self.train.steps // 20)})
        return self.model_copy(update={"measure": measure})
