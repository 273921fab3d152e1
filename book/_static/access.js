// For readers without a mouse, and for those who hear the page: what the theme leaves out.
document.addEventListener("DOMContentLoaded", () => {
  // The name of a button holds the words on it: "Search Ctrl + K", not "Search"; of a fold "Show code cell source".
  document
    .querySelectorAll(".search-button-field[aria-label], summary[aria-label]")
    .forEach((e) => e.removeAttribute("aria-label"));

  // Sphinx calls the bibliography a list, and puts anchors between its items.
  document.querySelectorAll(".citation-list[role=list]").forEach((e) => e.removeAttribute("role"));

  // Three icons, of which two are hidden, would all be read out after the button's own name.
  document.querySelectorAll(".theme-switch-button").forEach((button) => {
    const silence = () => {
      button.querySelectorAll("[title]").forEach((e) => e.removeAttribute("title"));
      button.querySelectorAll("svg").forEach((e) => {
        e.querySelectorAll("title").forEach((title) => title.remove());
        ["role", "aria-labelledby"].forEach((name) => e.removeAttribute(name));
        e.setAttribute("aria-hidden", "true");
      });
    };
    silence();
    new MutationObserver(silence).observe(button, { childList: true, subtree: true });
  });

  // What scrolls can be scrolled by keys. The theme does it for code and plain tables alone.
  const reach = () =>
    document.querySelectorAll("figure.exhibit > div").forEach((e) => {
      if (e.scrollWidth > e.clientWidth) e.tabIndex = 0;
      else e.removeAttribute("tabindex");
    });
  reach();
  window.addEventListener("resize", reach);
});
