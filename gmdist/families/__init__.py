"""The catalogue of families: name, class, config. A new family is one file here and one line below."""

from gmdist.families.autoencoder import PlainAutoencoder, PlainAutoencoderConfig
from gmdist.families.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from gmdist.families.conditional_gan import ConditionalGAN, ConditionalGANConfig
from gmdist.families.cyclegan import CycleGAN, CycleGANConfig
from gmdist.families.dcgan import DCGAN, DCGANConfig
from gmdist.families.ddpm import DDPM, DDPMConfig
from gmdist.families.family import Family
from gmdist.families.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from gmdist.families.pixelcnn import PixelCNN, PixelCNNConfig
from gmdist.families.stylegan2 import StyleGAN2, StyleGAN2Config
from gmdist.families.transformer_prior import TransformerPrior, TransformerPriorConfig
from gmdist.families.vae import VAE, VAEConfig
from gmdist.families.vanilla_gan import VanillaGAN, VanillaGANConfig
from gmdist.families.vit_vqvae import ViTVQVAE, ViTVQVAEConfig
from gmdist.families.vq_vae import VQVAE, VQVAEConfig

CATALOGUE: dict[str, tuple[type[Family], type]] = {
    "autoencoder": (PlainAutoencoder, PlainAutoencoderConfig),
    "autoencoder_kl": (AutoencoderKL, AutoencoderKLConfig),
    "conditional_gan": (ConditionalGAN, ConditionalGANConfig),
    "cyclegan": (CycleGAN, CycleGANConfig),
    "dcgan": (DCGAN, DCGANConfig),
    "ddpm": (DDPM, DDPMConfig),
    "gan": (VanillaGAN, VanillaGANConfig),
    "latent_diffusion": (LatentDiffusion, LatentDiffusionConfig),
    "pixelcnn": (PixelCNN, PixelCNNConfig),
    "stylegan2": (StyleGAN2, StyleGAN2Config),
    "transformer_prior": (TransformerPrior, TransformerPriorConfig),
    "vae": (VAE, VAEConfig),
    "vit_vqvae": (ViTVQVAE, ViTVQVAEConfig),
    "vq_vae": (VQVAE, VQVAEConfig),
}
