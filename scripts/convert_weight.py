"""MindFormers' ``convert_weight.py`` of DeepSeek-V3: see ``deepspan convert hf-to-mindspore``.

python scripts/convert_weight.py --torch_ckpt_path DeepSeek-V3 --mindspore_ckpt_path out --infer True
"""

if __name__ == "__main__":
    import checkout

    checkout.use_checkout()
    from deepspan.scripts.original_conversions import convert_weight

    raise SystemExit(convert_weight())
