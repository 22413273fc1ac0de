"""Loss weights, as weights of the squared error of the clean data.

`Diffusion.weights` carries them over to the error of whatever the network predicts. SNR is alpha^2 / sigma^2.
"""

from torch import Tensor


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """The signal-to-noise ratio, held below gamma (Hang 2023). snr [N] -> [N]."""
    return snr.clamp(max=gamma)


def p2(snr: Tensor, gamma: float = 1.0) -> Tensor:
    """Less weight for what is nearly clean: on the noise's error, 1 / (k + SNR)^gamma with k = 1 (Choi 2022).

    snr [N] -> [N].
    """
    return snr / (1.0 + snr) ** gamma


def edm(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The weight that is 1 on the output of a preconditioned network (Karras 2022, Table 1). sigma [N] -> [N]."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
