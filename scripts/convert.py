"""DeepSeek's ``convert.py``, file by file instead of all in memory: see ``deepspan convert hf-to-demo``.

python scripts/convert.py --hf-ckpt-path DeepSeek-V3 --save-path demo --n-experts 256 --model-parallel 16
"""

if __name__ == "__main__":
    import checkout

    checkout.use_checkout()
    from deepspan.scripts.original_conversions import convert

    raise SystemExit(convert())
