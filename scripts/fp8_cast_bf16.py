"""DeepSeek's and MindFormers' ``fp8_cast_bf16.py``, without a GPU: see ``deepspan convert fp8-to-bf16``.

python scripts/fp8_cast_bf16.py --input-fp8-hf-path DeepSeek-V3 --output-bf16-hf-path DeepSeek-V3-bf16
"""

if __name__ == "__main__":
    import checkout

    checkout.use_checkout()
    from deepspan.scripts.original_conversions import fp8_cast_bf16

    raise SystemExit(fp8_cast_bf16())
