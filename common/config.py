"""One frozen tree of settings, read from TOML. Privacy fields stand apart from speed fields.

The shared sections (`Proposal`) travel to the sites and are hashed; `[simulation]` describes virtual hospitals;
`[performance]` and `[run]` change how fast and where, never what. Out of scope: the site's policy (client/policy).
"""

import hashlib
import json
import math
from typing import Annotated, Literal, final

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

IMAGE_SIZES = (28, 32, 64, 128)
IMAGE_CHANNELS = (1, 3)
MAX_CLASSES = 64
MAX_PROPOSAL_BYTES = 65_536
MAX_BATCH = 16_384
"""Bounds what one message can make a site allocate."""

MAX_STEP_IMAGES = 131_072
"""The same for the images of one private step, views and all."""

MAX_SITES = 10_000
MAX_COHORT_PATIENTS = 100_000_000
"""Bounds what a run can state of its sites, one or all together."""

MAX_REFINEMENTS = 16

MAX_ERRORS = 20
"""Faults of a configuration that are named: a message with thousands must not keep a site busy, nor fill its log."""

ROBUST_MINIMUM = {"median": 3, "trimmed-mean": 5, "krum": 5}
"""Updates that a robust rule needs to outvote one of them."""

ModelName = Literal["mlp", "dcgan", "resnet", "unet", "vae"]
Algorithm = Literal["local", "secure-sum"]
Transport = Literal["float32", "float16"]
GradientEngine = Literal["fast", "opacus"]
LearningRate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MAX_EPSILON = 1e6
"""No guarantee that allows more says anything. A site's policy, a proposal and what a site declares of itself, which is
stated as the federation's, are all held to it: who is charged has been told before."""
Epsilon = Annotated[float, Field(gt=0, le=MAX_EPSILON, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen section that knows its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@final
class ImageConfig(Section):
    """What an image is: `channels` x `size` x `size` pixels in [-1, 1], one of `classes`."""

    size: Literal[28, 32, 64, 128] = 32
    channels: Literal[1, 3] = 1
    """1: grey, 3: red, green and blue."""
    classes: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)] = ()
    """Class names in the order of their numbers; empty: the simulator takes those it finds."""


@final
class PrivacyConfig(Section):
    """The guarantee that is proposed, per patient and for the whole run."""

    epsilon: Epsilon = 10.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: Positive = 1.0
    batch_patients: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 64
    """Expected patients in one private step; the sample rate is this over the declared cohort, at most 1."""
    images_per_patient: Annotated[int, Field(ge=1, le=50)] = 1
    """Images averaged into one patient's contribution of one step."""
    views: Annotated[int, Field(ge=1, le=8)] = 1
    """Copies of each image, moved by a few pixels, averaged into the same contribution: they cost no budget."""
    min_patients: Annotated[int, Field(ge=2, le=1_000_000)] = 20
    """A site that declares fewer patients takes no part."""
    colluding_sites: Annotated[int, Field(ge=0, lt=MAX_SITES)] | Literal["all"] = "all"
    """With secure-sum: how many sites may pool what they know with the coordinator, or drop out, and the guarantee of
    the others still holds. `all`: each site's own noise is enough. A number needs that nobody sees the shares of single
    sites; deployed sites refuse it today."""

    @model_validator(mode="after")
    def _one_step_fits_in_memory(self) -> "PrivacyConfig":
        if self.batch_patients * self.images_per_patient * self.views > MAX_STEP_IMAGES:
            raise ValueError(
                f"batch_patients * images_per_patient * views = {self.batch_patients} * {self.images_per_patient} * "
                f"{self.views} exceeds {MAX_STEP_IMAGES} images in one step; lower one of them"
            )
        return self


@final
class WarmupConfig(Section):
    """Releases of which every patient is a part once, and the fit of the generator to them: round 0 and refinements."""

    share: Fraction = 0.7
    """Part of epsilon that all of the warm-up's releases together may cost; 0 switches them off. Without rounds of
    training they may cost all of it."""
    refinements: Annotated[int, Field(ge=0, le=MAX_REFINEMENTS)] = 0
    """How many of the first `federation.rounds` (all of them, if there are fewer) are releases of the same kind, each
    seen through a lens that is made from the generator as it stands by then. The budget is split evenly: they pay where
    noise is small beside a class (docs/quality.md)."""
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 400
    """Steps of the fit after each release."""
    batch_size: Annotated[int, Field(ge=8, le=MAX_BATCH)] = 48
    learning_rate: LearningRate = 2e-3


@final
class ModelConfig(Section):
    """The generator/discriminator pair (common/models)."""

    name: ModelName = "dcgan"
    latent_dim: Annotated[int, Field(ge=2, le=1024)] = 64
    generator_width: Annotated[int, Field(ge=8, le=256)] = 32
    discriminator_width: Annotated[int, Field(ge=8, le=256)] = 16


@final
class TrainConfig(Section):
    """Training in one round: at each site, or with secure-sum one step of all together."""

    algorithm: Algorithm = "local"
    """`local`: every site trains both networks, and the weights are averaged. `secure-sum`: a round is one step of one
    discriminator on the sum of what all sites send; it wants many rounds of one step."""
    steps_per_round: Annotated[int, Field(ge=1, le=100_000)] = 12
    """Private discriminator steps in one round."""
    d_steps_per_g_step: Annotated[int, Field(ge=1, le=5000)] | Literal["adaptive"] = 4
    """Private steps for each generator step, or the ladder that reads the accuracy on fakes."""
    loss: Literal["logistic", "wasserstein"] = "logistic"
    """Of an adversarial pair (common/losses). `wasserstein`: the difference of the critic's means; its weights are kept
    within a public bound after every step. The vae has its own and leaves this alone."""
    learning_rate_d: LearningRate = 5e-4
    learning_rate_g: LearningRate = 1e-4
    generator_batch: Annotated[int, Field(ge=2, le=MAX_BATCH)] = 64
    """Fakes in one generator step."""
    ema_decay: Fraction = 0.9
    """Decay per generator step of the averaged generator: a site's of the round, with secure-sum the run's."""


@final
class ServerConfig(Section):
    """How the coordinator combines updates."""

    aggregation: Literal["mean", "median", "trimmed-mean", "krum"] = "mean"
    weights: Literal["declared", "uniform"] = "declared"
    """Weights of the mean: the publicly declared cohort sizes, or all equal."""
    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Fraction = 0.9
    second_momentum: Fraction = 0.99
    adaptivity: Positive = 1e-3
    """The constant beside the root of the second moment in adam and yogi (tau in the paper)."""
    ema_decay: Fraction = 0.5
    """Decay per round of the averaged generator that is kept as the result."""


@final
class FederationConfig(Section):
    """The rounds and who must be there."""

    rounds: Annotated[int, Field(ge=0, le=100_000)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything reproducible: weights, fakes, and in the simulator also the sites' secrets."""
    min_sites: Annotated[int, Field(ge=1)] = 1
    """A round with fewer replies changes nothing and ends the run."""
    round_timeout_s: Positive = 3600.0
    connect_timeout_s: Positive = 120.0
    transport: Transport = "float32"
    """Numbers of the weights of a local round on the line, both ways. `float16` halves the bytes; sites round what they
    release after the noise, which costs no budget. Sums of the warm-up stay float32; secure-sum adds whole numbers."""


class Proposal(Section):
    """What the coordinator proposes to every site: all that decides what is learned and at what price."""

    image: ImageConfig = ImageConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    warmup: WarmupConfig = WarmupConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    federation: FederationConfig = FederationConfig()

    @model_validator(mode="after")
    def _algorithm_fits(self) -> "Proposal":
        train = self.train
        if train.algorithm == "local":
            if self.privacy.colluding_sites != "all":
                raise ValueError(
                    "privacy.colluding_sites is a number, but with train.algorithm = local no site relies on another; "
                    "remove it, or train with secure-sum"
                )
            return self
        if train.steps_per_round != 1 or train.d_steps_per_g_step == "adaptive":
            raise ValueError(
                "train.algorithm = secure-sum takes one private step a round and a fixed ratio; set "
                "train.steps_per_round = 1 and train.d_steps_per_g_step to a number"
            )
        if self.federation.transport != "float32":
            raise ValueError(
                "train.algorithm = secure-sum sends whole numbers that must add up exactly, not weights; remove "
                f"federation.transport = {self.federation.transport}"
            )
        if self.server != ServerConfig():
            raise ValueError(
                "train.algorithm = secure-sum knows no site's own update: it adds, and steps with Adam at "
                "train.learning_rate_d; leave all of [server] at its defaults"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> "Proposal":
        train, adversarial = self.train, self.model.name != "vae"
        if train.loss != "logistic" and not adversarial:
            raise ValueError(
                "model.name = vae has no adversary and a loss of its own, the evidence lower bound; remove "
                f"train.loss = {train.loss}"
            )
        if train.d_steps_per_g_step == "adaptive" and (train.loss != "logistic" or not adversarial):
            raise ValueError(
                "train.d_steps_per_g_step = adaptive reads how many fakes D tells, which it does only with "
                "train.loss = logistic and a model other than vae; set a number"
            )
        return self

    @property
    def refinements(self) -> int:
        """Rounds after round 0 that belong to the warm-up."""
        return min(self.warmup.refinements, self.federation.rounds) if self.warmup.share > 0 else 0

    @property
    def warmup_releases(self) -> int:
        """How many releases the warm-up has: round 0 and the refinements; 0 without one."""
        return 1 + self.refinements if self.warmup.share > 0 else 0

    @property
    def training_rounds(self) -> int:
        """Rounds of private steps, after those of the warm-up."""
        return self.federation.rounds - self.refinements

    def digest(self) -> str:
        """Return the SHA-256 of the shared sections, in hexadecimal.

        Guarantees:
            - speed_is_free: `[performance]`, `[run]` and `[simulation]` do not change the digest.
        """
        return hashlib.sha256(self.proposal().encode()).hexdigest()

    def proposal(self) -> str:
        """Return the shared sections as canonical JSON, the form that travels and is hashed."""
        shared = self.model_dump(mode="json", include=set(Proposal.model_fields))
        return json.dumps(shared, sort_keys=True, separators=(",", ":"))


@final
class SimulationConfig(Section):
    """The virtual hospitals. Never sent to a site."""

    data: str = ""
    """A DICOM folder, an NPZ, or a folder of PNG/JPEG with a CSV index; empty: phantoms."""
    label: str = "auto"
    """Where labels are: `auto`, `none`, `tag:KEYWORD` for DICOM, `column:NAME` for a CSV index."""
    sites: Annotated[int, Field(ge=1, le=MAX_SITES)] = 4
    partition: str = "dirichlet:1.0"
    """`iid`, `dirichlet:ALPHA` (skewed classes and sizes) or `by-site-column`."""
    holdout: Fraction = 0.2
    """Part of the patients that no site gets; the simulator tests the generator on them."""
    max_patients: Annotated[int, Field(ge=0, le=MAX_COHORT_PATIENTS)] = 0
    """Patients of all sites together, at most, drawn by the seed from those that are not held out; 0: all of them."""
    phantom_patients: Annotated[int, Field(ge=8, le=1_000_000)] = 1000
    start: Literal["none", "phantoms"] = "none"
    """What the generator has learned before the run: nothing, or, from phantoms, what chest X-rays look like."""
    missing_share: Fraction = 0.0
    """Fault: the chance of each site to be away from a round. Not from the warm-up, and federation.min_sites stay."""
    poor_site_budget: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fault: what is left of the first site's privacy.epsilon; an earlier run stands in its ledger with the rest."""
    one_class_site: bool = False
    """Fault: the first site has patients of the most frequent class alone, as many as it would have without."""

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        if value in ("iid", "by-site-column"):
            return value
        name, _, alpha = value.partition(":")
        try:
            if name == "dirichlet" and 0 < float(alpha) < math.inf:
                return value
        except ValueError:
            pass
        raise ValueError("expected iid, by-site-column or dirichlet:ALPHA with ALPHA > 0")


@final
class PerformanceConfig(Section):
    """What changes speed and nothing else; outside the digest."""

    engine: Literal["local", "flower"] = "local"
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    """Threads of one tensor operation; a part of bit-for-bit reproduction, so the same for both engines."""
    gradients: GradientEngine = "fast"
    """How a site gets the gradients of single patients: its own engine, or the slower reference it is held against."""
    parallel_sites: Annotated[int, Field(ge=1, le=256)] = 1
    """Sites that train at a time with the flower engine; the local engine trains one after the other."""


@final
class RunConfig(Section):
    """Where a run stands and how it starts; outside the digest."""

    out: str = ""
    """Run folder; empty: the next runs/run-NNNN, or with resume the newest."""
    resume: bool = False
    dry_run: bool = False


@final
class Config(Proposal):
    """The whole tree, as in a TOML file and as `--print-config` writes it."""

    simulation: SimulationConfig = SimulationConfig()
    performance: PerformanceConfig = PerformanceConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _pairs_that_cannot_both_hold(self) -> "Config":
        if self.federation.rounds == 0 and self.warmup.share == 0:
            raise ValueError("federation.rounds = 0 and warmup.share = 0 leave nothing to learn; raise one of them")
        needed = ROBUST_MINIMUM.get(self.server.aggregation, 1)
        if self.federation.min_sites < needed:
            raise ValueError(
                f"server.aggregation = {self.server.aggregation} outvotes nobody among fewer than {needed} sites; set "
                f"federation.min_sites to at least {needed} (it is {self.federation.min_sites}), or use mean"
            )
        if self.federation.min_sites > self.simulation.sites:
            raise ValueError(
                f"federation.min_sites = {self.federation.min_sites} exceeds simulation.sites = "
                f"{self.simulation.sites}; lower one or raise the other"
            )
        return self
