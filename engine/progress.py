from tqdm import tqdm


class Progress:
    def __init__(self, total, first_step, enabled):
        self.bar = tqdm(total=total, initial=first_step, disable=not enabled)

    def update(self, step):
        self.bar.update()

    def show(self, **figures):
        self.bar.set_postfix(figures)

    def note(self, text):
        tqdm.write(text)

    def close(self):
        self.bar.close()
