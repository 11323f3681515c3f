/* Search without a server: a page that was opened as a file may start no Worker. Here a Worker is a
   hidden frame, which runs the script and gets and sends the same messages. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      const page = this.frame.contentDocument;
      inside.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data: data }));
      inside.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => this.load(page, next)), Promise.resolve());
      this.load(page, url).then(() => {
        const messages = this.waiting;
        this.waiting = null;
        messages.forEach((data) => this.postMessage(data));
      });
    }
    load(page, url) {
      return new Promise((done, failed) => {
        const script = page.createElement("script");
        script.src = url;
        script.onload = done;
        script.onerror = () => failed(new Error(`${url} could not be loaded`));
        page.head.append(script);
      });
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
