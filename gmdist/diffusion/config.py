"""The settings of a diffusion process, and which of them go together."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from gmdist.checks import one_of
from gmdist.diffusion import predictions, samplers, schedules, spacings
from gmdist.diffusion.noising import EDMNoise, FlowNoise

DISCRETE = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
}
SCHEDULES = (*DISCRETE, "flow", "edm")
PREDICTIONS = {
    "eps": predictions.eps,
    "x0": predictions.x0,
    "v": predictions.v,
    "flow": predictions.flow,
    "edm": predictions.edm,
}
WEIGHTS = ("uniform", "min_snr", "p2", "edm")
MAX_GUIDANCE = 1000.0  # far beyond any use, and far below where numbers end
SAMPLERS = {
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
    "euler": samplers.euler,
    "euler_ancestral": samplers.euler_ancestral,
    "heun": samplers.heun,
    "dpmpp_2m": samplers.dpmpp_2m,
    "flow_euler": samplers.flow_euler,
}
TIMESTEP_SPACINGS = {
    "trailing": spacings.trailing_timesteps,
    "leading": spacings.leading_timesteps,
    "linspace": spacings.linspace_timesteps,
}

_NUM_TIMESTEPS = 1000
_MOST_LEFT = 0.2  # of alpha at the last timestep, before it shows; Stable Diffusion has 0.07
_MAX_TIMESTEPS = 1_000_000
_WITH_BETAS = ("linear", "scaled_linear", "sigmoid")
_WITH_SNR = ("eps", "x0", "v")
_DIVIDE_BY_ALPHA = ("euler", "euler_ancestral", "heun")
_DIVIDE_BY_NEXT_ALPHA = ("ddpm", "dpmpp_2m")
_LEAST_BETA = 1e-8  # of less float64 keeps few digits of 1 - abar, and of 1e-17 none
_LEAST_ALPHA = 1e-30  # data divided by less are infinite in fp32: it counts as 0
_PREDICTION_NEEDS = {
    "eps": "is for discrete schedules",
    "x0": "is for discrete schedules",
    "v": "needs alpha^2 + sigma^2 = 1",
    "flow": "is the direction of a straight path",
    "edm": "needs alpha = 1",
}


@dataclass
class SamplerConfig:
    """How images are drawn from a trained denoiser."""

    name: str = "ddim"  # ddim, ddpm, euler, euler_ancestral, heun, dpmpp_2m; flow_euler for the schedule flow
    num_steps: int = 50
    guidance: float = 1.0  # 1: none; above, classes are followed more closely (Ho 2022, Eq. 6 with w = guidance - 1)
    # Least and most noise at which guidance is used, as sigma / alpha (of a flow t / (1 - t)); None: at all of it.
    guidance_interval: tuple[float, float] | None = None
    spacing: str | None = None  # trailing, leading, linspace; karras for the schedule edm; None: the schedule's first
    ends_clean: bool = True  # false: at the noise of timestep 0, as Stable Diffusion 1 does (set_alpha_to_one false)

    def problem(self, diffusion: "DiffusionConfig") -> str | None:
        """Why these settings cannot be, with a process that has no problem itself; None if they can."""
        return self._name_problem(diffusion) or self._guidance_problem() or self._steps_problem(diffusion)

    def spacing_for(self, schedule: str) -> str:
        """The spacing asked for, or the first that the schedule has."""
        return self.spacing or _spacings_of(schedule)[0]

    def _name_problem(self, diffusion: "DiffusionConfig") -> str | None:
        if problem := one_of(SAMPLERS, name=self.name):
            return problem
        if self.name == "flow_euler" and diffusion.schedule != "flow":
            return f"name: 'flow_euler'; needs the straight path of schedule 'flow', not of '{diffusion.schedule}'"
        lost = diffusion.num_without_data()
        failing = (*(_DIVIDE_BY_ALPHA if lost > 0 else ()), *(_DIVIDE_BY_NEXT_ALPHA if lost > 1 else ()))
        if self.name in failing:
            where = "is 0" if lost == 1 else f"is 0, as at the last {lost} timesteps"
            others = [name for name in SAMPLERS if name not in failing]
            if diffusion.schedule != "flow":
                others.remove("flow_euler")
            return f"name: '{self.name}'; cannot start where alpha {where}; use {' or '.join(others)}"
        if self.name == "heun" and diffusion.schedule == "cosine" and self.spacing != "leading":
            # From sigma / alpha = 20,000 down to 30: the slopes at both ends say little of what is between.
            return "name: 'heun'; with schedule 'cosine' needs spacing 'leading', or its first step is too long"
        return None

    def _guidance_problem(self) -> str | None:
        if not 0.0 <= self.guidance <= MAX_GUIDANCE:
            return f"guidance: {self.guidance}; must be from 0 to {MAX_GUIDANCE:g}"
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0.0 <= low < high:
                return f"guidance_interval: {[low, high]}; must be [low, high] with 0 <= low < high (.inf: no end)"
        return None

    def _steps_problem(self, diffusion: "DiffusionConfig") -> str | None:
        spacing = self.spacing_for(diffusion.schedule)
        most = diffusion.num_timesteps if diffusion.is_discrete else _MAX_TIMESTEPS
        if not 1 <= self.num_steps <= most:
            return f"num_steps: {self.num_steps}; must be between 1 and {most}"
        valid = _spacings_of(diffusion.schedule)
        if spacing not in valid:
            return f"spacing: '{spacing}'; with schedule '{diffusion.schedule}' use {' or '.join(valid)}"
        if spacing == "leading" and diffusion.zero_terminal_snr:
            return "spacing: 'leading'; with zero_terminal_snr sampling must begin at the last timestep: use trailing"
        if not self.ends_clean:
            if not diffusion.is_discrete:
                return "ends_clean: false; is for discrete schedules"
            if TIMESTEP_SPACINGS[spacing](diffusion.num_timesteps, self.num_steps)[-1] == 0:
                return "ends_clean: false; the last of these steps is at timestep 0 already: use fewer, or 'leading'"
        return None


@dataclass
class DiffusionConfig:
    """The noise that the denoiser learns to remove, what it predicts, and how its loss is weighted."""

    schedule: str = "linear"  # linear, scaled_linear, cosine, sigmoid; flow; edm
    num_timesteps: int = _NUM_TIMESTEPS  # of the first four
    prediction: str = "eps"  # eps, x0, v; flow for the schedule flow; edm for the schedule edm
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    # First and last beta of linear, scaled_linear and sigmoid. None: 1e-4, 0.02; of scaled_linear 0.00085, 0.012.
    betas: tuple[float, float] | None = None
    zero_terminal_snr: bool = False  # rescale a discrete schedule so that its last timestep is pure noise (Lin 2023)
    weight: str = "uniform"  # of the output's squared error: uniform; min_snr, p2; edm, which is uniform on its output
    weight_gamma: float | None = None  # None: 5 for min_snr, 1 for p2
    flow: FlowNoise = field(default_factory=FlowNoise)
    edm: EDMNoise = field(default_factory=EDMNoise)

    @property
    def is_discrete(self) -> bool:
        """Timesteps are numbered."""
        return self.schedule in DISCRETE

    def abar(self) -> Tensor:
        """A discrete schedule: alpha^2 at each timestep. [T], float64."""
        abar = DISCRETE[self.schedule](self.num_timesteps, *(self.betas or ()))
        return schedules.zero_terminal_snr(abar) if self.zero_terminal_snr else abar

    def num_without_data(self) -> int:
        """The number of times, the last ones, whose alpha is 0."""
        if not self.is_discrete:
            return 1 if self.schedule == "flow" else 0
        return int((self.abar().sqrt() < _LEAST_ALPHA).sum())

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := self._schedule_problem() or self._prediction_problem() or self._weight_problem():
            return problem
        if problem := self.sampler.problem(self):
            return f"sampler.{problem}"
        return None

    def timesteps(self) -> list[int]:
        """Those of a discrete schedule that the sampler stops at, the noisiest first."""
        spacing = self.sampler.spacing_for(self.schedule)
        return TIMESTEP_SPACINGS[spacing](self.num_timesteps, self.sampler.num_steps)

    def first_gain(self) -> float:
        """What the sampler's first step multiplies errors of the prediction eps by: x0 is (x - sigma eps) / alpha."""
        first, *rest = self.abar()[self.timesteps()].sqrt().tolist()
        return (rest[0] if rest else 1.0) / first

    def doubt(self) -> str | None:
        """What is hardly meant, as "key: value; why"; None if there is nothing."""
        if not self.is_discrete:
            return None
        alpha, first = self.abar().sqrt(), self.timesteps()[0]
        if (left := float(alpha[-1])) > _MOST_LEFT:
            return (
                f"num_timesteps: {self.num_timesteps}; the last one has {left:.0%} of the data, and samples begin "
                "without: set betas that end higher, the schedule 'cosine', or zero_terminal_snr: true"
            )
        if (left := float(alpha[first])) > _MOST_LEFT:
            return (
                f"sampler.num_steps: {self.sampler.num_steps}; the first is at timestep {first} of "
                f"{self.num_timesteps}, which has {left:.0%} of the data, and samples begin without: take the spacing "
                f"'trailing', or a number that divides {self.num_timesteps}"
            )
        return None

    def _schedule_problem(self) -> str | None:
        if problem := one_of(SCHEDULES, schedule=self.schedule):
            return problem
        if not 1 <= self.num_timesteps <= _MAX_TIMESTEPS:
            return f"num_timesteps: {self.num_timesteps}; must be between 1 and {_MAX_TIMESTEPS}"
        if not self.is_discrete and self.num_timesteps != _NUM_TIMESTEPS:
            return f"num_timesteps: {self.num_timesteps}; schedule '{self.schedule}' has none: leave it out"
        if self.betas is not None:
            first, last = self.betas
            if self.schedule not in _WITH_BETAS:
                return f"betas: {[first, last]}; belong to schedules {', '.join(_WITH_BETAS)}"
            if not _LEAST_BETA <= first <= last < 1.0:
                return f"betas: {[first, last]}; must be [first, last] with {_LEAST_BETA:g} <= first <= last < 1"
        if self.zero_terminal_snr and (not self.is_discrete or self.num_timesteps < 2):
            return "zero_terminal_snr: true; is for discrete schedules of at least 2 timesteps"
        for name, settings in (("flow", self.flow), ("edm", self.edm)):
            if settings != type(settings)() and self.schedule != name:
                return f"{name}: {settings}; belongs to schedule '{name}', not to '{self.schedule}'"
            if problem := settings.problem():
                return f"{name}.{problem}"
        return None

    def _prediction_problem(self) -> str | None:
        if problem := one_of(PREDICTIONS, prediction=self.prediction):
            return problem
        valid = _WITH_SNR if self.is_discrete else (self.schedule,)
        if self.prediction not in valid:
            reason = _PREDICTION_NEEDS[self.prediction]
            return (
                f"prediction: '{self.prediction}'; {reason}; with schedule '{self.schedule}' use {' or '.join(valid)}"
            )
        if self.prediction == "eps" and self.zero_terminal_snr:
            return "prediction: 'eps'; with zero_terminal_snr must be x0 or v: pure noise says nothing of the data"
        if self.prediction == "eps" and (lost := self.num_without_data()):
            return f"prediction: 'eps'; must be x0 or v, as alpha is 0 at the last {lost} timesteps: use smaller betas"
        return None

    def _weight_problem(self) -> str | None:
        if problem := one_of(WEIGHTS, weight=self.weight):
            return problem
        if self.weight in ("min_snr", "p2") and self.prediction not in _WITH_SNR:
            return f"weight: '{self.weight}'; is for predictions eps, x0 and v; with '{self.prediction}' use uniform"
        if self.weight == "edm" and self.prediction != "edm":
            return f"weight: 'edm'; is for prediction edm; with '{self.prediction}' use uniform"
        if self.weight_gamma is not None:
            if self.weight not in ("min_snr", "p2"):
                return f"weight_gamma: {self.weight_gamma}; belongs to weights min_snr and p2, not to '{self.weight}'"
            if not 0.0 < self.weight_gamma < math.inf:
                return f"weight_gamma: {self.weight_gamma}; must be a number above 0"
        return None


def _spacings_of(schedule: str) -> tuple[str, ...]:
    if schedule == "edm":
        return ("karras",)
    return tuple(TIMESTEP_SPACINGS) if schedule in DISCRETE else ("trailing",)
