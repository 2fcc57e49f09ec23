// Runs before the page is drawn, so that a dark page never flashes white. A plain script for that reason.
(() => {
  try {
    const theme = localStorage.getItem("jaxserve.theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    // No storage: the system's choice holds.
  }
})();
