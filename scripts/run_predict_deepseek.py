"""MindFormers' ``run_predict_deepseek.py``: see ``deepspan generate``.

python scripts/run_predict_deepseek.py --config predict_deepseek3_671b.yaml --input "请介绍一下北京的景点"
"""

if __name__ == "__main__":
    import checkout

    checkout.use_checkout()
    from deepspan.scripts.original_predict import run_predict_deepseek

    raise SystemExit(run_predict_deepseek())
