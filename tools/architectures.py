"""The architectures that run, as a table in Markdown: docs/architectures.md.

    python -m tools.architectures > docs/architectures.md
"""

from pybmc.models.config import REGISTRY

# What people know the models by.
MODELS = {
    "afmoe": "Trinity",
    "apertus": "Apertus", "arcee": "AFM 4.5B", "bailingmoe2": "Ling 2, Ring 2", "bloom": "BLOOM",
    "bert": "BERT, MiniLM, BGE, mxbai, Arctic Embed, E5", "cohere2": "Command R7B, Command A, Aya",
    "command-r": "Command R, R+", "deepseek2": "DeepSeek V2 to V3.1, R1, Kimi K2, GLM 4.7 Flash",
    "dots1": "dots.llm1", "ernie4_5": "ERNIE 4.5", "ernie4_5-moe": "ERNIE 4.5 A3B", "exaone4": "EXAONE 4",
    "falcon": "Falcon", "falcon-h1": "Falcon H1", "gemma": "Gemma",
    "gemma-embedding": "EmbeddingGemma", "gemma2": "Gemma 2", "gemma3": "Gemma 3", "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4", "glm4": "GLM 4", "glm4moe": "GLM 4.5 to 4.7", "gpt-oss": "gpt-oss", "gpt2": "GPT-2",
    "gptneox": "Pythia, GPT-NeoX", "granite": "Granite 3 and 4", "granitehybrid": "Granite 4 hybrids",
    "granitemoe": "Granite 3 MoE", "hunyuan-dense": "Hunyuan", "hunyuan-moe": "Hunyuan A13B", "hy-v3": "HY 3",
    "internlm2": "InternLM 2 and 3", "jina-bert-v2": "Jina Embeddings 2", "laguna": "Laguna", "lfm2": "LFM2",
    "lfm2moe": "LFM2 A1B", "llama": "Llama 1 to 3, Mistral, Mixtral, TinyLlama, SmolLM 1 and 2, Yi",
    "mellum": "Mellum 2", "minicpm": "MiniCPM", "minimax-m2": "MiniMax M2", "mistral3": "Ministral 3",
    "modern-bert": "ModernBERT", "mpt": "MPT", "nemotron": "Nemotron 4", "nemotron_h": "Nemotron Nano 2",
    "nemotron_h_moe": "Nemotron 3 Nano", "nomic-bert": "Nomic Embed", "nomic-bert-moe": "Nomic Embed 2",
    "olmo2": "OLMo 2 and 3", "olmoe": "OLMoE", "phi2": "Phi 1.5 and 2", "phi3": "Phi 3 to 4",
    "phimoe": "Phi 3.5 MoE", "qwen2": "Qwen 1.5 to 2.5", "qwen2moe": "Qwen 1.5 MoE, Qwen 2 MoE",
    "qwen2vl": "Qwen 2 VL, text", "qwen3": "Qwen 3, Qwen 3 Embedding and Reranker",
    "qwen35": "Qwen 3.5 and 3.6", "qwen35moe": "Qwen 3.5 and 3.6 MoE", "qwen3moe": "Qwen 3 MoE",
    "qwen3next": "Qwen 3 Next", "qwen3vl": "Qwen 3 VL, text", "qwen3vlmoe": "Qwen 3 VL MoE, text",
    "seed_oss": "Seed OSS", "smallthinker": "SmallThinker", "smollm3": "SmolLM 3", "stablelm": "StableLM 2",
    "starcoder2": "StarCoder 2",
}


def row(name: str) -> str:
    spec = REGISTRY[name]
    code = f"[`{spec.layer.__name__}`](../{spec.layer.__module__.replace('.', '/')}.py)"
    return f"| `{name}` | {MODELS[name]} | {code} | {spec.golden or '-'} |"


def table() -> str:
    held = sum(bool(spec.golden) for spec in REGISTRY.values())
    return "\n".join([
        "# Architectures", "",
        f"{len(REGISTRY)} architectures run. The golden file of {held} of them, a tiny model with logits of "
        "llama.cpp in float32, "
        "holds what is computed (`python -m tools.golden DIR`); those without one follow descriptions only.",
        "`pybmc show FILE` says whether a file runs, and why not. This page is made "
        "by `python -m tools.architectures`.", "", "| `general.architecture` | models | code | golden file |",
        "|---|---|---|---|", *map(row, sorted(REGISTRY)), ""])


if __name__ == "__main__":
    print(table(), end="")
