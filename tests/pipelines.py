"""Tiny pipelines with random weights, of the real diffusers classes, saved as folders."""

import json

import torch

# Warnings of optional image processors that nobody here uses.
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

transformers.logging.set_verbosity_error()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Of a deep-compression autoencoder's encoder and decoder.
DC_SIZES = {
    "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
    "block_out_channels": (4, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1),
    "qkv_multiscales": ((), (), (), (5,)),
}


def clip_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_tokenizer(longest):
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=longest)


def qwen_tokenizer():
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {word: i for i, word in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(vocab=words, merges=[], additional_special_tokens=marks[1:])


def gemma_tokenizer():
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], add_bos_token=True)


def clip(kind, width=32):
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config)


def t5(kind=T5EncoderModel, config=T5Config, width=32):
    return kind(config(vocab_size=40, d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2))


def qwen(width=32):
    text = {
        "vocab_size": 260,
        "hidden_size": width,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes))


def gemma(width=32):
    return Gemma2Model(
        Gemma2Config(
            vocab_size=40,
            hidden_size=width,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def autoencoder(channels, blocks=2, **more):
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **more,
    )


def flux(folder):
    """Guidance as an input of the network, packed latents, a shift that depends on the resolution."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=t5_tokenizer(512),
        vae=autoencoder(4, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
    )


def sd3(folder):
    """CFG of a doubled batch, three text encoders, a constant shift."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    tokenizer = clip_tokenizer(folder)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        text_encoder_3=t5(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer(256),
        transformer=transformer,
        vae=autoencoder(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
    )


def wan(folder):
    """Videos, a call for each branch, another text encoder."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(512),
        text_encoder=t5(UMT5EncoderModel, UMT5Config),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer,
    )


def qwen_image(folder):
    """CFG that keeps the conditional norm of packed tokens, a video autoencoder, grids that end early."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=qwen(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def lumina2(folder):
    """Time and velocity the other way round, CFG that keeps a line's norm, padded prompts with masks."""
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(320, 8, 8),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(4, 4, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )


def sana(folder):
    """A scheduler of diffusion models set to flow, with whole timesteps; sizes that go by a table if one lets them."""
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
    )
    sizes = {f"{half}coder_{name}": value for half in ("en", "de") for name, value in DC_SIZES.items()}
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma(),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41, **sizes),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
        ),
    )


def stable_diffusion(folder, prediction="epsilon"):
    """A diffusion model: UNet, variance-preserving path, 1000 timesteps."""
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=autoencoder(4),
        text_encoder=clip(CLIPTextModel),
        tokenizer=clip_tokenizer(folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def livelier(module):
    """Random weights large enough for the velocity to depend on state, time, prompt and guidance."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.4)
    return module


def save(make, folder, **options):
    """Build a pipeline and save it; returns it as it is loaded again (a text encoder's ties are its own business)."""
    torch.manual_seed(0)
    pipeline = make(folder / "words", **options)
    livelier(getattr(pipeline, "transformer", None) or pipeline.unet)
    pipeline.save_pretrained(folder / "pipeline")
    loaded = DiffusionPipeline.from_pretrained(folder / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    return loaded
