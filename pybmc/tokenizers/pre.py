"""How BPE vocabularies cut text into words, by the name in tokenizer.ggml.pre.

The patterns are those that the models' own tokenizer.json files publish, under the names that llama.cpp gave
them. They apply one after the other: what an earlier pattern matched, and what it left between its matches,
is cut further by the next. Where llama.cpp had to adapt a pattern to its own regex engine, the published one
is here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pre:
    """A pre-tokenizer. Regexes in Oniguruma's syntax."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False     # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False           # unless tokenizer.ggml.add_bos_token says otherwise
    always_bos: bool = False        # whatever tokenizer.ggml.add_bos_token says
    byte_level: bool = True         # False: words are UTF-8, U+2581 for spaces, <0xNN> tokens for the rest
    drops_space: bool = False       # white space only separates words


def _chars(*spans: str) -> str:
    """The inside of a character class from hexadecimal code points and ranges of them."""
    return re.sub("[0-9A-F]+", lambda point: f"\\x{{{point[0]}}}", " ".join(spans)).replace(" ", "")


_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"       # English contractions
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ONE_LINE = r"\s*[\r\n]|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_RIGHT_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"                     # 1234567 -> 1 234 567
_CASED = _chars(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A",
    "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF",
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D",
    "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4",
    "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F",
    "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F",
    "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3",
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943")
_CJK = f"[{_chars('4E00-9FA5 800-4E00 AC00-D7FF')}]+"
_HAN_KANA = f"[{_chars('4E00-9FA5 3040-309F 30A0-30FF')}]+"
_ASIAN = "[" + _chars("4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF",
                      "1780-17FF 1000-109F AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF") + "]+"
_YOUTU = "|".join(f"[{_chars(span)}]+" for span in (
    "AC00-D7A3 3131-318E", "FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F",
    "3105-312F", "4E00-9FA5 3040-309F 30A0-30FF"))
_PUNCTUATED = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
               r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+")


def _cased(digits: str, endings: str = f"{_SHORT}?", symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*") -> str:
    """Words that end where upper case begins."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{_UPPER}*{_LOWER}+{endings}|{lead}{_UPPER}+{_LOWER}*{endings}"
    return f"{words}|{digits}|{symbols}|{_SPACES}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_LINES = r"[^\n]+|[\n]+"
_HAN = r"\p{Han}"

_HALVES = "".join(rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_KIMI = (_cased(r"\p{N}{1,3}", symbols=_SYMBOLS)
         .replace(_UPPER, f"[{_UPPER}&&[^{_HAN}]]").replace(_LOWER, f"[{_LOWER}&&[^{_HAN}]]"))
_ASCII_SPANS = _chars("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_PHRASE = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_NOT_PUNCTUATION = " ?[^(\\s|.,!?…。，、।۔،)]+"

DEFAULT = Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

_KINDS = {
    "default": DEFAULT,
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 "
    "mellum modern-bert mpt olmo jais trillion granite-docling exaone4": Pre((_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Pre((r"\p{N}", _GPT2)),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano":
        Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe chatglm-bpe glm4": Pre((_LLAMA3,)),
    "jais-2": Pre((_LLAMA3.replace(r"|\s+(?!\S)|\s+", rf"{_HALVES}|\s"),)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2": Pre((_QWEN2,)),
    "qwen35": Pre((rf"{_SHORT}|{_MARKED}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)),
    "ufakzeka": Pre((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}",)),
    "laguna": Pre((_LINES, _QWEN2)),
    "minicpm5": Pre((r"\p{N}{1,3}", rf"{_SHORT}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"), ignore_merges=True),
    "falcon": Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Pre((r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_ASCII_SPANS}]+", r"\s+$", _CJK, r"\p{N}+")),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4":
        Pre((r"\p{N}{1,3}", _HAN_KANA, rf"{_PUNCTUATED}[\r\n]*|{_SPACES}")),
    "spark2_5": Pre((r"\p{N}{1,3}", _HAN_KANA, rf"{_PUNCTUATED}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    "youtu": Pre((_YOUTU, _cased(r"\p{N}")), ignore_merges=True),
    "poro-chat bloom gpt3-finnish": Pre((_NOT_PUNCTUATION,)),
    "viking": Pre((_NOT_PUNCTUATION, r"\p{N}")),
    "tekken": Pre((_cased(r"\p{N}", endings=""),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pre((_cased(r"\p{N}{1,3}"),)),
    "granite-embed-multi-97m": Pre((_cased(r"\p{N}{1,3}"),), ignore_merges=True),
    "tiny_aya cohere2moe": Pre((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(r"\p{N}{1,3}", symbols=_SYMBOLS))),
    "chameleon": Pre(("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )",
                      r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2), add_bos=True),
    "kimi-k2": Pre((rf"{_HAN}+|{_KIMI}",)),
    "superbpe": Pre((_RIGHT_DIGITS,)),
    "afmoe": Pre((_RIGHT_DIGITS, _ASIAN, rf"{_PUNCTUATED}[\r\n]*|{_SPACES}")),
    "bailingmoe bailingmoe2 llada-moe":
        Pre((rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_SYMBOLS}|{_ONE_LINE}",)),
    "seed-coder": Pre((rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "exaone-moe":
        Pre((rf"{_SHORT}|{_PHRASE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_ONE_LINE}",)),
    "gemma4 granite-embed-multi-311m": Pre((_LINES,), always_bos=True, byte_level=False),
    "sarvam-moe": Pre((_LINES,), byte_level=False),
    "whitespace": Pre((), byte_level=False, drops_space=True),
}

PRE = {name: pre for names, pre in _KINDS.items() for name in names.split()}
