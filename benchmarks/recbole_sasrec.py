"""RecBole's SASRec on a log, the whole run: the peer of training_run.py, in the environment benchmarks/.venv-peers.

    python recbole_sasrec.py FOLDER SETTINGS

FOLDER/log/log.inter is the log. SETTINGS is JSON: dim, hidden, layers, heads, history, dropout, batch (rows), epochs,
threads, loss ("CE", a softmax over the catalogue, or "BPR", one sampled negative). The last line of the standard output
is JSON: sequences (of all epochs), negatives (of a sequence), load_s, train_s.
"""

import json
import sys
import time


def main() -> None:
    began = time.perf_counter()
    folder, told = sys.argv[1], json.loads(sys.argv[2])
    sys.argv = sys.argv[:1]  # RecBole reads it too
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    torch.set_num_threads(told["threads"])
    sampling = None if told["loss"] == "CE" else {"distribution": "uniform", "sample_num": 1}
    config = Config(model="SASRec", dataset="log", config_dict={
        "data_path": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp", "MAX_ITEM_LIST_LENGTH": told["history"],
        "hidden_size": told["dim"], "inner_size": told["hidden"], "n_layers": told["layers"], "n_heads": told["heads"],
        "hidden_dropout_prob": told["dropout"], "attn_dropout_prob": told["dropout"], "loss_type": told["loss"],
        "train_neg_sample_args": sampling, "epochs": told["epochs"], "train_batch_size": told["batch"],
        "learning_rate": 1e-3, "eval_step": 0, "use_gpu": False, "gpu_id": "", "show_progress": False,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "state": "ERROR", "checkpoint_dir": f"{folder}/saved"})
    init_seed(0, True)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    loaded = time.perf_counter()
    model = SASRec(config, train.dataset).to(config["device"])
    Trainer(config, model).fit(train, valid_data=None, saved=True, show_progress=False)
    ended = time.perf_counter()
    negatives = 1 if told["loss"] == "BPR" else int(dataset.item_num) - 1
    print(json.dumps({"sequences": len(train.dataset) * told["epochs"], "negatives": negatives,
                      "load_s": loaded - began, "train_s": ended - loaded}))


if __name__ == "__main__":
    main()
