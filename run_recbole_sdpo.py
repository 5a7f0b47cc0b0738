"""Train and evaluate SDPO-LLM or any model of RecBole: python run_recbole_sdpo.py
--model=SDPO-LLM --dataset=ml-100k"""

from recbole_sdpo.command.script import main

if __name__ == "__main__":
    main()
